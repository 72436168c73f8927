'use strict';
// Compiled methods are kept between runs: Amber takes some ten milliseconds for each of more than a thousand, in every
// image again. What is kept under a method's source, class and variables is what the compiler answered for just these.
const crypto = require('crypto');
const fs = require('fs');
const path = require('path');

const FILE = path.join(__dirname, 'node_modules', '.cache', 'compiled.json');
const MOST = 20000; // methods; beyond, those of the last run stay
const { version } = require('amber/package.json');

module.exports = function keepCompiled({ api, globals }) {
  const kept = fs.existsSync(FILE) ? JSON.parse(fs.readFileSync(FILE, 'utf8')) : {};
  const used = {};
  let isNew = false;

  const { fn: compile } = globals.Compiler.methods['compile:forClass:protocol:'];
  function compileOnce(source, behavior, protocol) {
    const context = [version, source, behavior._name(), behavior._allInstanceVariableNames(), protocol];
    const key = crypto.createHash('sha256').update(JSON.stringify(context)).digest('base64');
    if (!kept[key]) {
      kept[key] = compile.call(this, source, behavior, protocol);
      isNew = true;
    }
    used[key] = kept[key];
    return kept[key];
  }
  const selector = 'compile:forClass:protocol:';
  const method = api.method({ selector, protocol: 'compiling', fn: compileOnce, messageSends: [] });
  api.addMethod(method, globals.Compiler);

  // To be called when all is filed in. Several images may do it at once: each writes a whole file and renames it.
  return function save() {
    if (!isNew) return;
    fs.mkdirSync(path.dirname(FILE), { recursive: true });
    const aside = `${FILE}.${process.pid}`;
    fs.writeFileSync(aside, JSON.stringify(Object.keys(kept).length > MOST ? used : kept));
    fs.renameSync(aside, FILE);
  };
};
