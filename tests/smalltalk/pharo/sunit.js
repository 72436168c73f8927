'use strict';
// SUnit: Amber has one of its own; here is what Pharo's TestCase says besides, in Pharo's words.
const DEFAULT_PRECISION = 0.0001; // Float defaultComparisonPrecision

module.exports = function sunit({ globals, nil, on, subclass, signal }) {
  const { TestCase, TestFailure } = globals;
  const TestSkipped = subclass(globals.Error, 'TestSkipped');
  const text = (object) => String(object._printString());

  on(globals.Error, {
    description() {
      const message = this._messageText();
      const name = this._class()._name();
      return message === nil || message === '' ? name : `${name}: ${message}`;
    },
  });
  // As in Pharo, Integers are only ever close to themselves: here that is true of whole Floats too.
  const isClose = (one, other, precision) => one === other || Math.abs(one - other) <= precision;
  on(globals.Number, {
    'closeTo:'(other) { return isClose(Number(this), Number(other), DEFAULT_PRECISION); },
    'closeTo:precision:'(other, precision) { return isClose(Number(this), Number(other), precision); },
  });

  function require(holds, description) {
    if (!holds) signal(TestFailure, typeof description === 'function' ? description() : String(description._value()));
  }
  function raises(block, exception, accepts = () => true) {
    let accepted = false;
    const completed = block._on_do_(exception, (error) => { accepted = accepts(error); return signalled; });
    return completed === signalled && accepted;
  }
  const signalled = {};
  const describes = (part) => (error) => String(error._description()).includes(part);
  const got = (actual, expected) => `Got ${text(actual)} instead of ${text(expected)}.`;
  const unexpected = (actual, expected) => `Unexpected equality of ${text(actual)} and ${text(expected)}.`;
  const counts = (collection) => {
    const found = new Map();
    collection._do_((each) => found.set(text(each), (found.get(text(each)) || 0) + 1));
    return JSON.stringify([...found].sort());
  };

  // A variable that was never assigned is JavaScript's undefined in some of Amber's objects.
  const answerSelf = (methods) =>
    Object.fromEntries(
      Object.entries(methods).map(([selector, fn]) => [
        selector,
        function (...args) { fn.apply(this, args.map((each) => each ?? nil)); return this; },
      ]),
    );
  on(TestCase, answerSelf({
    'assert:'(condition) { require(condition._value(), () => 'Assertion failed'); },
    'assert:description:'(condition, description) { require(condition._value(), description); },
    'assert:equals:'(actual, expected) { require(actual.__eq(expected), () => got(actual, expected)); },
    'assert:identicalTo:'(actual, expected) {
      require(actual.__eq_eq(expected), () => `${text(actual)} is not identical to ${text(expected)}.`);
    },
    'assert:closeTo:'(actual, expected) { require(actual._closeTo_(expected), () => got(actual, expected)); },
    'assert:closeTo:precision:'(actual, expected, precision) {
      require(actual._closeTo_precision_(expected, precision), () => got(actual, expected));
    },
    'assertCollection:equals:'(actual, expected) { require(actual.__eq(expected), () => got(actual, expected)); },
    'assertCollection:hasSameElements:'(actual, expected) {
      require(counts(actual) === counts(expected), () => got(actual, expected));
    },
    'assertCollection:includesAll:'(actual, part) {
      require(actual._includesAll_(part), () => `${text(actual)} does not include all in ${text(part)}`);
    },
    'assertEmpty:'(collection) {
      require(collection._isEmpty(), () => `${text(collection)} should have been empty`);
    },
    'denyEmpty:'(collection) {
      require(!collection._isEmpty(), () => `${text(collection)} should not have been empty`);
    },
    'deny:'(condition) { require(!condition._value(), () => 'Denial failed'); },
    'deny:description:'(condition, description) { require(!condition._value(), description); },
    'deny:equals:'(actual, expected) { require(!actual.__eq(expected), () => unexpected(actual, expected)); },
    'deny:identicalTo:'(actual, expected) { require(!actual.__eq_eq(expected), () => unexpected(actual, expected)); },
    'deny:closeTo:'(actual, expected) { require(!actual._closeTo_(expected), () => got(actual, expected)); },
    'deny:closeTo:precision:'(actual, expected, precision) {
      require(!actual._closeTo_precision_(expected, precision), () => got(actual, expected));
    },
    fail() { require(false, () => 'Assertion failed'); },
    'fail:'(description) { require(false, description); },
    skip() { signal(TestSkipped, ''); },
    'skip:'(reason) { signal(TestSkipped, reason); },
    'should:raise:'(block, exception) { require(raises(block, exception), () => 'Assertion failed'); },
    'should:raise:description:'(block, exception, description) { require(raises(block, exception), description); },
    'should:raise:whoseDescriptionIncludes:description:'(block, exception, part, description) {
      require(raises(block, exception, describes(part)), description);
    },
    'should:raise:withExceptionDo:'(block, exception, check) {
      const checked = (error) => { check._value_(error); return true; };
      require(raises(block, exception, checked), () => 'Assertion failed');
    },
    'shouldnt:raise:'(block, exception) { require(!raises(block, exception), () => 'Assertion failed'); },
  }));

  // Pharo's test methods take no arguments, and concrete classes do not inherit each other's.
  on(TestCase.klass, {
    testSelectors() { return Object.keys(this.methods).filter((each) => /^test\w*$/.test(each)); },
    shouldInheritSelectors() {
      return this !== TestCase && (this.superclass._isAbstract() || this._testSelectors().length === 0);
    },
  });
};
