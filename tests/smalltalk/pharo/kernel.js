'use strict';
// Objects and numbers.
module.exports = function kernel({ globals, on, subclass }) {
  on(globals.Object, { isCollection: () => false, isDictionary: () => false, isFloat: () => false });
  on(globals.AssociativeCollection, { isDictionary: () => true });
  on(globals.Number, {
    asFloat() { return Number(this); },
    isFloat() { return !Number.isInteger(Number(this)); },
    isFinite() { return Number.isFinite(Number(this)); },
    isInteger() { return Number.isInteger(Number(this)); },
  });
  on(subclass(globals.Number, 'Float').klass, {
    infinity: () => Infinity,
    negativeInfinity: () => -Infinity,
    nan: () => NaN,
  });

  // Waiting: nothing else runs in this image.
  const Delay = subclass(globals.Object, 'Delay', ['milliseconds']);
  on(Delay.klass, {
    'forMilliseconds:'(number) {
      const delay = this._new();
      delay['@milliseconds'] = number;
      return delay;
    },
  });
  on(Delay, {
    wait() {
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, this['@milliseconds']);
      return this;
    },
  });
};
