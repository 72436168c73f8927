'use strict';
// Objects and numbers.
module.exports = function kernel({ globals, on, subclass }) {
  on(globals.Object, { isCollection: () => false, isBlock: () => false });
  on(globals.BlockClosure, { isBlock: () => true });
  on(globals.Number, {
    asFloat() { return Number(this); },
    'between:and:'(low, high) { return this >= low && this <= high; },
    exp() { return Math.exp(this); },
    isFloat() { return !Number.isInteger(Number(this)); },
    isInteger() { return Number.isInteger(Number(this)); },
  });
  on(subclass(globals.Number, 'Float').klass, {
    infinity: () => Infinity,
    negativeInfinity: () => -Infinity,
    nan: () => NaN,
  });
};
