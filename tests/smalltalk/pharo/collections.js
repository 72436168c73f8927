'use strict';
// Collections, float arrays and bytes.
module.exports = function collections({ globals, on, wrap, signal }) {
  on(globals.Collection, { isCollection: () => true });

  // Amber's are equal only if their keys came in the same order.
  on(globals.Dictionary, {
    '='(other) {
      if (other.klass !== this.klass || other._size() !== this._size()) return false;
      const same = (key) => other._includesKey_(key) && this._at_(key).__eq(other._at_(key));
      return this._keys().every(same);
    },
  });

  // In Amber these two are one class; in Pharo only an Array is a JSON list.
  class OrderedCollection extends Array {}
  const Ordered = on(wrap(globals.Array, 'OrderedCollection', OrderedCollection), {
    removeFirst() { return this.length ? this.shift() : signal(globals.Error, 'this collection is empty'); },
  });
  on(Ordered.klass, { 'new:': () => new OrderedCollection() });

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
