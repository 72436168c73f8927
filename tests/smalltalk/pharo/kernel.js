'use strict';
// Objects and numbers.
module.exports = function kernel({ globals, on, subclass }) {
  on(globals.Object, { isCollection: () => false });
  on(globals.Number, {
    asFloat() { return Number(this); },
    isFloat() { return !Number.isInteger(Number(this)); },
    isInteger() { return Number.isInteger(Number(this)); },
    'between:and:'(low, high) { return this >= low && this <= high; },
    exp() { return Math.exp(this); },
    asIEEE32BitWord() { return new Uint32Array(new Float32Array([this]).buffer)[0]; },
  });
  on(subclass(globals.Number, 'Float').klass, {
    infinity: () => Infinity,
    negativeInfinity: () => -Infinity,
    nan: () => NaN,
  });
};
