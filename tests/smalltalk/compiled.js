'use strict';
// Remembers what Amber's compiler answered for a method, next to Amber itself: compiling is most of what starting an
// image takes. The answer depends on the class, its variables and the source, and on nothing else.
const crypto = require('crypto');
const fs = require('fs');
const path = require('path');

const FILE = path.join(path.dirname(require.resolve('amber/package.json')), '..', '.cache', 'compiled.json');
const MOST = 20000;

function load() {
  try {
    return new Map(Object.entries(JSON.parse(fs.readFileSync(FILE, 'utf8'))));
  } catch (error) {
    if (error.code === 'ENOENT' || error instanceof SyntaxError) return new Map();
    throw error;
  }
}

const known = load();
const used = new Map();

// What compile(), the compiler, answers for the source of a method of the class.
exports.compiled = function compiled(klass, source, compile) {
  const context = [klass._name(), klass._allInstanceVariableNames(), source];
  const key = crypto.createHash('sha256').update(JSON.stringify(context)).digest('base64');
  if (!used.has(key)) used.set(key, known.has(key) ? known.get(key) : compile());
  return used.get(key);
};

// Several images may do this at once: each writes a whole file, and the last one stays.
exports.save = function save() {
  if ([...used.keys()].every((key) => known.has(key))) return;
  const all = known.size + used.size > MOST ? used : new Map([...known, ...used]);
  fs.mkdirSync(path.dirname(FILE), { recursive: true });
  const aside = `${FILE}.${process.pid}`;
  fs.writeFileSync(aside, JSON.stringify(Object.fromEntries(all)));
  fs.renameSync(aside, FILE);
};
