'use strict';
// How a shim makes classes and methods in Amber.
const PACKAGE = 'Pharo-Shims';

module.exports = function definer({ api, globals }) {
  api.addPackage(PACKAGE);

  // The first method for a new selector is replaced by a doesNotUnderstand: stub in classes that wrap
  // JavaScript's, hence twice.
  function on(klass, methods) {
    for (const [selector, fn] of Object.entries(methods)) {
      for (let pass = 0; pass < 2; pass++) {
        api.addMethod(api.method({ selector, protocol: 'pharo', fn, messageSends: [] }), klass);
      }
    }
    return klass;
  }
  function subclass(superclass, name, instanceVariables = []) {
    api.addClass(name, superclass, instanceVariables, PACKAGE);
    api.init(globals[name]);
    return globals[name];
  }
  function wrap(superclass, name, constructor) {
    delete globals[name];
    api.wrapClassName(name, PACKAGE, constructor, superclass);
    api.init(globals[name]);
    return globals[name];
  }
  const signal = (klass, text) => klass._new()._signal_(text);

  return { on, subclass, wrap, signal };
};
