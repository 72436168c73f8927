'use strict';
// Objects and numbers.
module.exports = function kernel({ globals, on, signal, subclass }) {
  on(globals.Object, {
    isBlock: () => false,
    inspect() { return this; },
    isCollection: () => false,
    isDictionary: () => false,
    isFloat: () => false,
    isInteger: () => false,
    'perform:with:'(selector, argument) { return this._perform_withArguments_(selector, [argument]); },
  });
  on(globals.BlockClosure, { isBlock: () => true });
  on(globals.AssociativeCollection, { isDictionary: () => true });
  on(globals.Number, {
    asFloat() { return Number(this); },
    'between:and:'(least, most) { return this >= least && this <= most; },
    exp() { return Math.exp(this); },
    isFloat() { return !Number.isInteger(Number(this)); },
    isFinite() { return Number.isFinite(Number(this)); },
    isInteger() { return Number.isInteger(Number(this)); },
    isNaN() { return Number.isNaN(Number(this)); },
    asIEEE32BitWord() { return new Uint32Array(new Float32Array([this]).buffer)[0]; },
  });
  // What is no number on the right adapts itself to the number, as Pharo's numbers ask it to. (Between two numbers
  // Amber's compiler calculates without sending anything.)
  const operators = { '+': (a, b) => a + b, '-': (a, b) => a - b, '*': (a, b) => a * b, '/': (a, b) => a / b };
  for (const [selector, compute] of Object.entries(operators)) {
    on(globals.Number, {
      [selector](other) {
        if (typeof other === 'number') return compute(Number(this), other);
        return other._adaptToNumber_andSend_(Number(this), selector);
      },
    });
  }
  // Pharo's begins with asTrueFraction.
  const fixed = globals.Number.methods['printShowingDecimalPlaces:'].fn;
  on(globals.Number, {
    'printShowingDecimalPlaces:'(places) {
      if (!Number.isFinite(Number(this))) signal(globals.Error, `Cannot truncate ${this._printString()}`);
      return fixed.call(this, places);
    },
  });
  const ZeroDivide = subclass(subclass(globals.Error, 'ArithmeticError'), 'ZeroDivide');
  const quotient = (a, b) => (b === 0 ? signal(ZeroDivide, '') : Math.floor(a / b));
  on(globals.Number, {
    '//'(other) { return quotient(Number(this), other); },
    '\\\\'(other) { return Number(this) - quotient(Number(this), other) * other; },
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
