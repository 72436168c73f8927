'use strict';
// Objects and numbers.
module.exports = function kernel({ globals, on, subclass }) {
  on(globals.Object, { isCollection: () => false });
  on(globals.Number, {
    asFloat() { return Number(this); },
    isFloat() { return !Number.isInteger(Number(this)); },
    isInteger() { return Number.isInteger(Number(this)); },
  });
  on(subclass(globals.Number, 'Float').klass, {
    infinity: () => Infinity,
    negativeInfinity: () => -Infinity,
    nan: () => NaN,
  });
};
