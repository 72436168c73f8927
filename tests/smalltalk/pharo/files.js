'use strict';
// Files, as FileReference has them: a write stream overwrites from the start and does not cut off what was there, and
// renameTo: refuses a name that is taken.
const fs = require('fs');
const path = require('path');

module.exports = function files({ globals, on, subclass, signal }) {
  const FileException = subclass(globals.Error, 'FileException');
  const FileExists = subclass(FileException, 'FileExists');
  const FileDoesNotExistException = subclass(FileException, 'FileDoesNotExistException');

  const FileReference = subclass(globals.Object, 'FileReference', ['path']);
  function reference(name) {
    const file = FileReference._new();
    file['@path'] = path.resolve(String(name));
    return file;
  }
  on(globals.String, { asFileReference() { return reference(this); } });

  function open(name) {
    try {
      return fs.openSync(name, fs.constants.O_WRONLY | fs.constants.O_CREAT);
    } catch (error) {
      return signal(FileDoesNotExistException, `File @ ${name}`);
    }
  }
  const BinaryReadStream = subclass(globals.Object, 'ZnBufferedReadStream');
  on(BinaryReadStream, { upToEnd() { return this.bytes; } });
  on(FileReference, {
    asFileReference() { return this; },
    basename() { return path.basename(this['@path']); },
    extension() { return path.extname(this['@path']).slice(1); },
    parent() { return reference(path.dirname(this['@path'])); },
    '/'(name) { return reference(path.join(this['@path'], String(name))); },
    fullName() { return this['@path']; },
    exists() { return fs.existsSync(this['@path']); },
    contents() { return fs.readFileSync(this['@path'], 'utf8'); },
    ensureDelete() {
      try {
        fs.rmSync(this['@path'], { force: true });
      } catch (error) {
        signal(FileException, `Cannot delete ${this['@path']}`);
      }
    },
    'renameTo:'(basename) {
      const target = path.join(path.dirname(this['@path']), String(basename));
      if (fs.existsSync(target)) signal(FileExists, target);
      if (!fs.existsSync(this['@path'])) signal(FileDoesNotExistException, `File @ ${this['@path']}`);
      fs.renameSync(this['@path'], target);
      this['@path'] = target;
      return this;
    },
    'binaryReadStreamDo:'(block) {
      if (!fs.existsSync(this['@path'])) signal(FileDoesNotExistException, `File @ ${this['@path']}`);
      const stream = BinaryReadStream._new();
      stream.bytes = Uint8Array.from(fs.readFileSync(this['@path']));
      return block._value_(stream);
    },
    'binaryWriteStreamDo:'(block) {
      const handle = open(this['@path']);
      try {
        fs.writeSync(handle, globals.ByteArray._streamContents_((stream) => block._value_(stream)));
        return block;
      } finally {
        fs.closeSync(handle);
      }
    },
    'writeStreamDo:'(block) {
      const handle = open(this['@path']);
      try {
        const text = String(globals.String._streamContents_((stream) => block._value_(stream)));
        fs.writeSync(handle, text);
        return block;
      } finally {
        fs.closeSync(handle);
      }
    },
  });
};
