'use strict';
// Files in Smalltalk in chunk format and answers JSON: {"result": ...} or {"error": {"class", "message", ...}}.
//
//   node run.js compile FILE.st...     -> one line, result {"classes": {name: {superclass, comment, selectors}}, "problems": []}
//   node run.js run FILE.st...         -> one line for each line of standard input, in JSON: a script is a string,
//   node run.js count FILE.st...          {"do": "tests"} and {"do": "unrun"} are requests; the latter wants `count`
//
// Tests are all TestCases, their result {"Class>>testSelector": {outcome, message}}; unrun are the methods in the
// files that nothing has run so far.
// A script is what one would type into a playground: its variables need no declaration, and its value is that
// of the last statement. What JSON cannot hold is an object {"float": "NaN"}, {"float": "-0"} and so on.
const fs = require('fs');

console.log = console.error; // standard output is for the answer
const amber = require('./amber.js');
require('./pharo/index.js')(amber);
const { compiled, save } = require('./compiled.js');
const { globals, nil } = amber;

const [command, ...files] = process.argv.slice(2);

// What Amber's Importer does, but a method that was compiled before is not compiled again.
function fileIn(file) {
  const chunks = [...fs.readFileSync(file, 'utf8').matchAll(/((?:[^!]|!!)*)!(?!!)/g)];
  const next = () => (chunks.length ? chunks.shift()[1].replaceAll('!!', '!').trim() : '');
  while (chunks.length) {
    const chunk = next();
    if (chunk) globals.Compiler._new()._evaluateExpression_(chunk);
    else fileInMethods(next(), next);
  }
}

function fileInMethods(header, next) {
  const [, name, side, protocol] = /^(\w+)( class)? methodsFor: '(.*)'$/.exec(header) || [];
  if (!globals[name]) throw new Error(`Not the beginning of methods: !${header}!`);
  const klass = side ? globals[name].klass : globals[name];
  for (let source = next(); source; source = next()) install(klass, source, protocol.replaceAll("''", "'"));
}

function install(klass, source, protocol) {
  const compiler = globals.Compiler._new();
  const code = compiled(klass, source, () => compiler._compile_forClass_protocol_(source, klass, protocol));
  const method = compiler._eval_forPackage_(code, klass._packageOfProtocol_(protocol));
  globals.ClassBuilder._new()._installMethod_forClass_protocol_(method, klass, protocol);
}

function classNames(text) {
  return [...text.matchAll(/^\w+ subclass: #(\w+)/gm)].map((match) => match[1]);
}

// Selectors that the classes send and that nothing at all implements.
function problems(names) {
  const known = new Set();
  for (const klass of amber.api.classes()) {
    for (const each of [klass, klass.klass]) Object.keys(each.methods).forEach((selector) => known.add(selector));
  }
  const found = [];
  for (const name of names) {
    for (const klass of [globals[name], globals[name].klass]) {
      for (const method of Object.values(klass.methods)) {
        const missing = method.messageSends.filter((selector) => !known.has(selector));
        missing.forEach((selector) => found.push(`${klass.className}>>${method.selector} sends ${selector}`));
        const undefinedClasses = method.referencedClasses.filter((each) => !globals[each]);
        undefinedClasses.forEach((each) => found.push(`${klass.className}>>${method.selector} names ${each}`));
      }
    }
  }
  return found;
}

function compile() {
  const names = files.flatMap((file) => classNames(fs.readFileSync(file, 'utf8')));
  const classes = {};
  for (const name of names) {
    const klass = globals[name];
    classes[name] = {
      superclass: klass.superclass.className,
      comment: String(klass.comment),
      selectors: [...Object.keys(klass.methods), ...Object.keys(klass.klass.methods).map((each) => `class ${each}`)],
    };
  }
  return { classes, problems: problems(names) };
}

const methods = (behavior) => Object.values(behavior.methods);

// Methods of ours tell when they run, classes' own and those that extend others.
const unrun = new Set();
function count() {
  for (const behavior of amber.api.classes().flatMap((klass) => [klass, klass.klass])) {
    for (const method of methods(behavior)) if (!before.has(method)) countRuns(behavior, method);
  }
}

function countRuns(behavior, method) {
  const name = `${behavior._name()}>>${method.selector}`;
  const { fn } = method;
  unrun.add(name);
  method.fn = function (...args) {
    unrun.delete(name);
    return fn.apply(this, args);
  };
  amber.api.addMethod(method, behavior);
}

function tests() {
  const outcomes = {};
  for (const klass of amber.api.classes()) {
    if (!klass._inheritsFrom_(globals.TestCase) || klass._isAbstract()) continue;
    for (const selector of klass._allTestSelectors()) outcomes[`${klass.className}>>${selector}`] = outcome(klass, selector);
  }
  return outcomes;
}

function outcome(klass, selector) {
  try {
    klass._selector_(selector)._runCase();
    return { outcome: 'passed', message: '' };
  } catch (error) {
    const { class: name, message } = describe(error);
    const known = { TestFailure: 'failed', TestSkipped: 'skipped' };
    return { outcome: known[name] || 'error', message: known[name] ? message : `${name}: ${message}` };
  }
}

function toJs(object) {
  if (object === nil || object === undefined) return null;
  if (typeof object === 'number') return isPlain(object) ? object : { float: numberName(object) };
  if (typeof object === 'string' || typeof object === 'boolean') return object;
  if (object instanceof String) return String(object);
  if (Array.isArray(object) || ArrayBuffer.isView(object)) return Array.from(object, toJs);
  if (object.klass === globals.Dictionary) {
    const pairs = {};
    object._keysAndValuesDo_((key, value) => { pairs[key] = toJs(value); });
    return pairs;
  }
  return object._printString();
}

function isPlain(number) {
  return Number.isFinite(number) && !Object.is(number, -0);
}

function numberName(number) {
  return Object.is(number, -0) ? '-0' : String(number);
}

function evaluate(script) {
  const assigned = [...withoutText(script).matchAll(/\b([a-z]\w*)\s*:=/g)].map((match) => match[1]);
  const declared = [...withoutText(script).matchAll(/\|([\w\s]*)\|/g)].flatMap((match) => match[1].split(/\s+/));
  const temporaries = [...new Set(assigned)].filter((name) => !declared.includes(name));
  const statements = temporaries.length ? `|${temporaries.join(' ')}| ${script}` : script;
  return globals.Compiler._new()._evaluateExpression_(`[${statements}] value`);
}

function withoutText(script) {
  return script.replace(/"[^"]*"|'[^']*'/g, ' ');
}

function describe(error) {
  if (!error.klass || !error.smalltalkError) return { class: 'JavaScript', message: String(error.stack || error) };
  const details = { class: error.klass.className, message: String(error._messageText()) };
  for (const name of ['status', 'code', 'body']) {
    if (error._respondsTo_(name)) details[name] = toJs(error[`@${name}`]);
  }
  return details;
}

function answer(compute) {
  try {
    return { result: compute() };
  } catch (error) {
    return { error: describe(error) };
  }
}

const say = (object) => process.stdout.write(`${JSON.stringify(object)}\n`);

const requests = { tests, unrun: () => [...unrun].sort() };
const perform = (line) => (line.do ? requests[line.do]() : toJs(evaluate(line)));

const before = new Set(amber.api.classes().flatMap((each) => [...methods(each), ...methods(each.klass)]));
const loaded = answer(() => files.forEach(fileIn));
save();
if (loaded.error) {
  say(loaded);
} else if (command === 'compile') {
  say(answer(compile));
} else {
  if (command === 'count') count();
  const lines = require('readline').createInterface({ input: process.stdin });
  lines.on('line', (line) => say(answer(() => perform(JSON.parse(line)))));
}
