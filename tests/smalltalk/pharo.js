'use strict';
// What Amber lacks of Pharo, as far as the package uses it, with Pharo's answers:
// Zinc's client, STON's JSON, float arrays, a few selectors. Everything that differs between the two stands here.
//
// Not imitated, because Amber cannot tell: a Symbol is a String here, a whole Float is an Integer, there are no
// Fractions (Pharo's STON reads 1e-5 as one) and an Array can grow.
const exchange = require('./http.js');

module.exports = function installPharo({ api, globals, nil }) {
  const PACKAGE = 'Pharo-Shims';
  api.addPackage(PACKAGE);

  // The first method for a new selector is replaced by a doesNotUnderstand: stub in classes that wrap
  // JavaScript's, hence twice.
  function on(klass, methods) {
    for (const [selector, fn] of Object.entries(methods)) {
      for (let pass = 0; pass < 2; pass++) {
        api.addMethod(api.method({ selector, protocol: 'pharo', fn, messageSends: [] }), klass);
      }
    }
    return klass;
  }
  function subclass(superclass, name, instanceVariables = []) {
    api.addClass(name, superclass, instanceVariables, PACKAGE);
    api.init(globals[name]);
    return globals[name];
  }
  function wrap(superclass, name, constructor) {
    delete globals[name];
    api.wrapClassName(name, PACKAGE, constructor, superclass);
    api.init(globals[name]);
    return globals[name];
  }
  const signal = (klass, text) => klass._new()._signal_(text);

  // Exceptions of the network and of Zinc.
  const NetworkError = subclass(globals.Error, 'NetworkError');
  const ConnectionTimedOut = subclass(NetworkError, 'ConnectionTimedOut');
  const ConnectionClosed = subclass(NetworkError, 'ConnectionClosed');
  const NameLookupFailure = subclass(NetworkError, 'NameLookupFailure');
  const ZnEntityTooLarge = subclass(globals.Error, 'ZnEntityTooLarge');
  const ZnCharacterEncodingError = subclass(globals.Error, 'ZnCharacterEncodingError');
  const STONReaderError = subclass(globals.Error, 'STONReaderError');
  const STONWriterError = subclass(globals.Error, 'STONWriterError');

  // Objects, numbers, collections.
  on(globals.Object, { isCollection: () => false });
  on(globals.Collection, { isCollection: () => true });
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

  // In Amber these two are one class; in Pharo only an Array is a JSON list.
  class OrderedCollection extends Array {}
  on(wrap(globals.Array, 'OrderedCollection', OrderedCollection).klass, {
    'new:': () => new OrderedCollection(),
  });

  function fixedSize(name, constructor) {
    const klass = on(wrap(globals.SequenceableCollection, name, constructor), {
      size() { return this.length; },
      numericallyIndexable() { return this; },
      'at:ifAbsent:'(index, block) {
        return index >= 1 && index <= this.length ? this[index - 1] : block._value();
      },
      'at:put:'(index, value) {
        if (!(index >= 1 && index <= this.length)) {
          signal(globals.Error, `Index ${index} is out of bounds 1..${this.length}`);
        }
        if (typeof value !== 'number') signal(globals.Error, `${name} holds numbers only`);
        this[index - 1] = value;
        return value;
      },
      'do:'(block) {
        this.forEach((each) => block._value_(each));
        return this;
      },
      shallowCopy() { return this.slice(); },
      'copyFrom:to:'(start, stop) { return this.slice(start - 1, stop); },
    });
    on(klass.klass, { 'new:': (size) => new constructor(size) });
    return klass;
  }
  fixedSize('Float32Array', Float32Array);
  fixedSize('ByteArray', Uint8Array);

  on(subclass(globals.Object, 'ZnBase64Encoder'), {
    'decode:'(string) {
      if (!/^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$/.test(string)) {
        signal(ZnCharacterEncodingError, 'Illegal Base64 input');
      }
      return Uint8Array.from(Buffer.from(string, 'base64'));
    },
  });

  // STONJSON: reads Arrays and Dictionaries with String keys; writes exactly these two, and no object twice.
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

  // Zinc.
  on(subclass(globals.Object, 'ZnMimeType').klass, { applicationJson: () => 'application/json' });
  const ZnEntity = subclass(globals.Object, 'ZnEntity', ['type', 'contents']);
  on(ZnEntity.klass, {
    'json:'(string) {
      const entity = this._new();
      entity['@type'] = 'application/json;charset=utf-8';
      entity['@contents'] = string;
      return entity;
    },
  });
  on(subclass(globals.Object, 'ZnResponse', ['code']), { code() { return this['@code']; } });

  const FAILURES = {
    ECONNREFUSED: [ConnectionTimedOut, ({ hostname, port }) => `Cannot connect to ${hostname}:${port || 80}`],
    ETIMEDOUT: [ConnectionTimedOut, () => 'Data receive timed out.'],
    ENOTFOUND: [NameLookupFailure, ({ hostname }) => hostname],
    EAI_AGAIN: [NameLookupFailure, ({ hostname }) => hostname],
    ECONNRESET: [ConnectionClosed, () => 'Connection closed while waiting for data.'],
  };
  function execute(client, method) {
    const url = new URL(client.url);
    url.pathname += (url.pathname.endsWith('/') ? '' : '/') + client.segments.map(encodeURIComponent).join('/');
    const headers = { 'user-agent': 'Zinc HTTP Components 1.0 (Amber)', accept: '*/*', ...client.headers };
    const entity = method === 'POST' ? client.entity : undefined;
    if (entity) headers['content-type'] = entity['@type'];
    const body = entity && entity['@contents'];
    const reply = exchange({ method, url: url.href, headers, body, timeout: client.seconds || 30 });
    if (reply.failure) {
      const [klass, text] = FAILURES[reply.failure] || [NetworkError, () => reply.message];
      signal(klass, text(url));
    }
    if (reply.body.length > (client.limit || 16 * 1024 * 1024)) signal(ZnEntityTooLarge, 'Entity too large');
    client.reply = reply;
    return client._contents();
  }
  const settings = {
    'url:'(string) { this.url = string; this.segments = []; },
    'addPath:'(segments) { segments._do_((each) => this.segments.push(String(each))); },
    'accept:'(type) { this.headers = { ...this.headers, accept: type }; },
    'timeout:'(seconds) { this.seconds = seconds; },
    'maximumEntitySize:'(bytes) { this.limit = bytes; },
    'setBearerAuthentication:'(key) { this.headers = { ...this.headers, authorization: `Bearer ${key}` }; },
    'entity:'(entity) { this.entity = entity; },
    beOneShot() { this.headers = { ...this.headers, connection: 'close' }; },
  };
  const answerSelf = (fn) => function (...args) { fn.apply(this, args); return this; };
  const ZnClient = subclass(globals.Object, 'ZnClient');
  on(ZnClient, Object.fromEntries(Object.entries(settings).map(([selector, fn]) => [selector, answerSelf(fn)])));
  on(ZnClient, {
    get() { return execute(this, 'GET'); },
    post() { return execute(this, 'POST'); },
    delete() { return execute(this, 'DELETE'); },
    isSuccess() { return this.reply.status >= 200 && this.reply.status < 300; },
    contents() { return this.reply.body.length ? new TextDecoder().decode(this.reply.body) : nil; },
    response() {
      const response = globals.ZnResponse._new();
      response['@code'] = this.reply.status;
      return response;
    },
  });
};
