'use strict';
// STONJSON: reads Arrays and Dictionaries with String keys; writes exactly these two, and no object twice.
module.exports = function ston({ globals, nil, on, subclass, signal }) {
  const STONReaderError = subclass(globals.Error, 'STONReaderError');
  const STONWriterError = subclass(globals.Error, 'STONWriterError');

  function fromJson(value) {
    if (value === null) return nil;
    if (Array.isArray(value)) return value.map(fromJson);
    if (typeof value !== 'object') return value;
    const dictionary = globals.Dictionary._new();
    for (const [key, each] of Object.entries(value)) dictionary._at_put_(key, fromJson(each));
    return dictionary;
  }
  function toJson(object, seen) {
    if (object === nil || object === undefined || object === null) return 'null';
    if (typeof object === 'number' && !Number.isFinite(object)) signal(STONWriterError, 'wrong object class for JSON mode');
    if (['string', 'number', 'boolean'].includes(typeof object)) return JSON.stringify(object);
    if (object instanceof String) return JSON.stringify(String(object));
    if (seen.has(object)) signal(STONWriterError, 'shared reference detected');
    seen.add(object);
    if (object.constructor === Array) return `[${object.map((each) => toJson(each, seen)).join()}]`;
    if (object.klass !== globals.Dictionary) signal(STONWriterError, 'wrong object class for JSON mode');
    const pairs = [];
    object._keysAndValuesDo_((key, value) => {
      if (!key._isString()) signal(STONWriterError, 'JSON key names in objects must be strings');
      pairs.push(`${JSON.stringify(String(key))}:${toJson(value, seen)}`);
    });
    return `{${pairs.join()}}`;
  }
  on(subclass(globals.Object, 'STONJSON').klass, {
    'fromString:'(string) {
      let value;
      try {
        value = JSON.parse(string);
      } catch (error) {
        signal(STONReaderError, error.message);
      }
      return fromJson(value);
    },
    'toString:': (object) => toJson(object, new Set()),
  });
};
