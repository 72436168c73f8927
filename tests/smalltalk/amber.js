'use strict';
// Loads Amber without a module loader of its own: its files are AMD modules.
const fs = require('fs');
const path = require('path');
const vm = require('vm');

const HOME = path.dirname(require.resolve('amber/package.json'));
const FOLDERS = { amber: path.join(HOME, 'support'), amber_core: path.join(HOME, 'src') };
const modules = new Map([
  ['amber/browser-compatibility', {}],
  ['jquery', {}],
]);

function resolve(name, base) {
  if (name.startsWith('.')) return path.posix.join(path.posix.dirname(base), name);
  return name === 'amber/Platform' ? 'amber_core/Platform-Node' : name;
}

function load(name) {
  if (modules.has(name)) return modules.get(name);
  const [folder, ...rest] = name.split('/');
  const file = path.join(FOLDERS[folder], rest.join('/')) + '.js';
  let exported;
  const define = (...args) => {
    const factory = args.pop();
    const names = args.pop() || [];
    const dependencies = names.map((each) => (each === 'require' ? load : load(resolve(each, name))));
    exported = typeof factory === 'function' ? factory(...dependencies) : factory;
  };
  vm.runInThisContext(`(function (define) {${fs.readFileSync(file, 'utf8')}\n})`, { filename: file })(define);
  modules.set(name, exported);
  return exported;
}

const amber = load('amber/lang');
load('amber_core/SUnit');
amber.initialize({});
module.exports = amber;
