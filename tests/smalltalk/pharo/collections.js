'use strict';
// Collections, float arrays and bytes.
module.exports = function collections({ globals, on, wrap, signal }) {
  on(globals.Collection, { isCollection: () => true });

  on(globals.Array.klass, { 'new:withAll:': (size, value) => new Array(size).fill(value) });
  on(globals.String, { codePoint() { return this.codePointAt(0); } });

  // In Amber these two are one class; in Pharo only an Array is a JSON list.
  class OrderedCollection extends Array {}
  on(wrap(globals.Array, 'OrderedCollection', OrderedCollection).klass, {
    'new:': () => new OrderedCollection(),
  });

  function fixedSize(name, constructor) {
    const klass = on(wrap(globals.SequenceableCollection, name, constructor), {
      size() { return this.length; },
      numericallyIndexable() { return this; },
      'at:ifAbsent:'(index, block) {
        return index >= 1 && index <= this.length ? this[index - 1] : block._value();
      },
      'at:put:'(index, value) {
        if (!(index >= 1 && index <= this.length)) {
          signal(globals.Error, `Index ${index} is out of bounds 1..${this.length}`);
        }
        if (typeof value !== 'number') signal(globals.Error, `${name} holds numbers only`);
        this[index - 1] = value;
        return value;
      },
      'do:'(block) {
        this.forEach((each) => block._value_(each));
        return this;
      },
      shallowCopy() { return this.slice(); },
      'copyFrom:to:'(start, stop) { return this.slice(start - 1, stop); },
    });
    on(klass.klass, { 'new:': (size) => new constructor(size) });
    return klass;
  }
  fixedSize('Float32Array', Float32Array);
  fixedSize('ByteArray', Uint8Array);
};
