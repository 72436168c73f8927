'use strict';
// Collections, float arrays and bytes.
module.exports = function collections({ globals, nil, on, subclass, wrap, signal }) {
  on(globals.Collection, { isCollection: () => true });
  on(globals.SequenceableCollection, {
    'indexOf:'(object) { return this._indexOf_ifAbsent_(object, { _value: () => 0 }); },
    'allButLast:'(count) { return this._copyFrom_to_(1, this._size() - count); },
    'with:collect:'(other, block) {
      if (other._size() !== this._size()) signal(globals.Error, 'otherCollection must be the same size');
      let index = 0;
      return this._collect_({ _value_: (each) => block._value_value_(each, other._at_(++index)) });
    },
    hash() { return [...String(this._printString())].reduce((sum, each) => sum + each.charCodeAt(0), 0); },
    'replaceFrom:to:with:startingAt:'(start, stop, replacement, first) {
      for (let index = start; index <= stop; index++) {
        this._at_put_(index, replacement._at_(first + index - start));
      }
      return this;
    },
  });
  // Amber's with:do: asks the other collection for no more than it needs.
  const SizeMismatch = subclass(globals.Error, 'SizeMismatch');
  const pairs = (one, other, block) => {
    if (one._size() !== other._size()) signal(SizeMismatch, 'collections differ in size');
    return Array.from({ length: one._size() }, (_, index) => block._value_value_(one._at_(index + 1), other._at_(index + 1)));
  };
  on(globals.SequenceableCollection, {
    'with:do:'(other, block) {
      pairs(this, other, block);
      return this;
    },
    'with:collect:'(other, block) { return pairs(this, other, block); },
  });
  on(globals.Array, { 'indexOf:'(object) { return this._indexOf_ifAbsent_(object, { _value: () => 0 }); } });
  on(globals.Array.klass, { 'new:withAll:': (size, value) => new Array(size).fill(value) });

  const outOfBounds = (index, size) => signal(globals.Error, `Index ${index} is out of bounds 1..${size}`);
  const at = {
    'at:'(index) {
      return index >= 1 && index <= this.length ? (this[index - 1] ?? nil) : outOfBounds(index, this.length);
    },
  };
  on(globals.Array, at);

  // Amber's are equal only if their keys came in the same order.
  on(globals.Dictionary, {
    '='(other) {
      if (other.klass !== this.klass || other._size() !== this._size()) return false;
      const same = (key) => other._includesKey_(key) && this._at_(key).__eq(other._at_(key));
      return this._keys().every(same);
    },
  });
  on(globals.String, {
    codePoint() { return this.codePointAt(0); },
    'includesSubstring:'(part) { return this.includes(String(part)); },
  });
  on(subclass(globals.Object, 'Character').klass, { 'value:': (code) => String.fromCodePoint(code) });

  // In Amber these two are one class; in Pharo only an Array is a JSON list.
  class OrderedCollection extends Array {}
  const Ordered = on(wrap(globals.Array, 'OrderedCollection', OrderedCollection), {
    removeFirst() { return this.length ? this.shift() : signal(globals.Error, 'this collection is empty'); },
  });
  on(Ordered.klass, { 'new:': () => new OrderedCollection() });

  const sizeOf = (size, name) => (size >= 0 ? size : signal(globals.Error, `${name} cannot have size ${size}`));
  const newArray = globals.Array.klass.methods['new:'].fn;
  on(globals.Array.klass, {
    'new:'(size) { return newArray.call(this, sizeOf(size, this._name())); },
  });

  function fixedSize(name, constructor) {
    const klass = on(wrap(globals.SequenceableCollection, name, constructor), {
      ...at,
      size() { return this.length; },
      numericallyIndexable() { return this; },
      'at:ifAbsent:'(index, block) {
        return index >= 1 && index <= this.length ? this[index - 1] : block._value();
      },
      'at:put:'(index, value) {
        if (!(index >= 1 && index <= this.length)) outOfBounds(index, this.length);
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
    on(klass.klass, { 'new:': (size) => new constructor(sizeOf(size, name)) });
    return klass;
  }
  // In Pharo's memory a Float32Array is its 32-bit words, which basicAt:put: writes.
  on(fixedSize('Float32Array', Float32Array), {
    'basicAt:put:'(index, word) {
      this.words ??= new Uint32Array(this.buffer, this.byteOffset, this.length);
      this.words[index - 1] = word;
      return word;
    },
  });
  const view = (bytes) => (bytes.view ??= new DataView(bytes.buffer, bytes.byteOffset, bytes.length));
  on(fixedSize('ByteArray', Uint8Array), {
    'longAt:bigEndian:'(index, bigEndian) { return view(this).getInt32(index - 1, !bigEndian); },
    'unsignedLongAt:bigEndian:'(index, bigEndian) { return view(this).getUint32(index - 1, !bigEndian); },
    'unsignedShortAt:bigEndian:'(index, bigEndian) { return view(this).getUint16(index - 1, !bigEndian); },
  });
  function endsInside(bytes) {
    try {
      new TextDecoder('utf-8', { fatal: true }).decode(bytes, { stream: true });
      return true;
    } catch (error) {
      return false;
    }
  }
  on(globals.ByteArray, {
    utf8Decoded() {
      try {
        return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(this);
      } catch (error) {
        if (endsInside(this)) signal(globals.ZnIncomplete, 'Incomplete utf-8 encoding');
        return signal(globals.ZnInvalidUTF8, 'Illegal byte for utf-8 encoding');
      }
    },
  });
  on(globals.ByteArray.klass, {
    'streamContents:'(block) {
      const stream = []._writeStream();
      block._value_(stream);
      return Uint8Array.from(stream._contents());
    },
  });
  on(globals.String, {
    utf8Encoded() { return Uint8Array.from(Buffer.from(String(this), 'utf8')); },
    'substrings:'(separators) { return this._subStrings_(separators); },
  });
};
