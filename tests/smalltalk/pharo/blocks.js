'use strict';
// Blocks that take as many arguments as they have, and the clock that times them.
module.exports = function blocks({ globals, on, subclass }) {
  const cull = (block, ...args) => block._valueWithPossibleArguments_(args.slice(0, block._numArgs()));
  on(globals.BlockClosure, {
    'cull:'(first) { return cull(this, first); },
    'cull:cull:'(first, second) { return cull(this, first, second); },
  });
  on(subclass(globals.Object, 'Time').klass, {
    microsecondClockValue: () => Math.floor((performance.timeOrigin + performance.now()) * 1000),
  });
};
