'use strict';
// Zinc's server, messages and URLs. A server here serves the clients of its own image: what they send to its port
// is handed over in process, since one thread cannot both wait for an answer and give it.
const { exchange, open } = require('../http.js');

const servers = new Map(); // port -> ZnServer, also one that stopped: nobody else will listen there
let nextPort = 1; // ports that no server outside takes unless it is the system's

// {method, url, headers, body, timeout in s} -> what http.js answers: with the body, or with read for its pieces.
function serve(request, isStreaming) {
  const { hostname, port } = new URL(request.url);
  const server = ['localhost', '127.0.0.1'].includes(hostname) && servers.get(Number(port || 80));
  if (!server) return (isStreaming ? open : exchange)(request);
  if (!server._isRunning()) return { failure: 'ECONNREFUSED', message: 'connection refused' };
  const started = Date.now();
  const reply = server.answer(request);
  if (Date.now() - started > request.timeout * 1000) return { failure: 'ETIMEDOUT', message: 'no data' };
  return isStreaming ? inPieces(reply) : reply;
}

function inPieces({ status, headers, body }) {
  const pieces = [body];
  return { status, headers, read: () => pieces.shift() || null, close() {} };
}

function install({ globals, nil, on, subclass, signal }) {
  const { ZnEntity, ZnResponse } = globals;
  const answerSelf = (methods) =>
    Object.fromEntries(
      Object.entries(methods).map(([selector, fn]) => [
        selector,
        function (...args) { fn.apply(this, args); return this; },
      ]),
    );
  const KeyNotFound = globals.KeyNotFound || subclass(globals.Error, 'KeyNotFound');
  const missing = (key) => signal(KeyNotFound, `key ${key._printString()} not found in ZnMultiValueDictionary`);

  // URLs: what they hold is decoded, what they print is encoded.
  const PATH_UNSAFE = /[^A-Za-z0-9\-_.~!$&'()*+,;=:@]/gu;
  const encode = (segment) => segment.replace(PATH_UNSAFE, (each) => encodeURIComponent(each));
  const ZnUrl = on(subclass(globals.Object, 'ZnUrl'), {
    pathSegments() { return this.url.pathname.split('/').slice(1).map(decodeURIComponent); },
    pathPrintString() { return this._pathSegments().map((each) => `/${encode(each)}`).join(''); },
    hasQuery() { return this.url.search.length > 1; },
    'queryAt:ifAbsent:'(key, block) {
      const values = this.url.searchParams.getAll(key);
      if (values.length === 0) return block._value();
      return values.length === 1 ? values[0] : values;
    },
    'queryAt:'(key) { return this._queryAt_ifAbsent_(key, () => missing(key)); },
    queryKeys() { return [...new Set(this.url.searchParams.keys())]; },
    port() { return this.url.port ? Number(this.url.port) : nil; },
    host() { return this.url.hostname; },
    asString() { return this.url.href; },
    'printOn:'(stream) { stream._nextPutAll_(this.url.href); return this; },
  });
  function urlObject(string) {
    const url = ZnUrl._new();
    url.url = new URL(string);
    return url;
  }

  // Headers: names are capitalised, as in Content-Type, whatever is asked for.
  const capitalised = (name) =>
    String(name).toLowerCase().replace(/(^|-)([a-z])/g, (_, dash, letter) => dash + letter.toUpperCase());
  const values = (headers) => headers.values || (headers.values = new Map());
  on(subclass(globals.Object, 'ZnHeaders'), {
    'at:put:'(name, value) { values(this).set(capitalised(name), value); return value; },
    'at:ifAbsent:'(name, block) {
      const value = values(this).get(capitalised(name));
      return value === undefined ? block._value() : value;
    },
    'at:'(name) { return this._at_ifAbsent_(name, () => missing(name)); },
    'includesKey:'(name) { return values(this).has(capitalised(name)); },
    contentLength() { return Number(this._at_('content-length')); },
    hasContentLength() { return this._includesKey_('content-length'); },
  });

  const message = {
    headers() { return this.fields || (this.fields = globals.ZnHeaders._new()); },
    entity() { return this.body || nil; },
    contents() { return this.body ? this.body._contents() : nil; },
    hasEntity() { return this.body !== undefined; },
  };
  on(subclass(globals.Object, 'ZnRequest'), {
    ...message,
    method() { return this.method; },
    uri() { return this.uri; },
    url() { return this.uri; },
  });
  on(ZnEntity, {
    contents() { return this['@contents']; },
    string() { return this['@contents']; },
    ...answerSelf({ 'contentType:'(type) { this['@type'] = typed(type); } }),
  });
  const typed = (type) => (/^(text\/|application\/json$)/.test(type) ? `${type};charset=utf-8` : String(type));
  function entity(contents, type) {
    const made = ZnEntity._new();
    made['@contents'] = contents;
    made['@type'] = typed(type);
    return made;
  }
  on(ZnEntity.klass, {
    'text:': (string) => entity(string, 'text/plain'),
    'with:': (string) => entity(string, 'text/plain'),
    'with:type:': (string, type) => entity(string, type),
  });
  on(ZnResponse, { ...message, ...answerSelf({ 'entity:'(body) { this.body = body; } }) });
  function response(status, body) {
    const made = ZnResponse._new();
    made['@code'] = status;
    if (body) made._entity_(body);
    return made;
  }
  on(ZnResponse.klass, {
    'statusCode:': (status) => response(status),
    'ok:': (body) => response(200, body),
    'notFound:': (url) => response(404, entity(`Not Found ${url._pathPrintString()}\r\n`, 'text/plain')),
    'serverError:': (text) => response(500, entity(`${text}\r\n`, 'text/plain')),
    noContent: () => response(204),
  });

  const ZnServer = on(subclass(globals.Object, 'ZnServer'), {
    ...answerSelf({
      start() { this.running = true; },
      stop() { this.running = false; },
      loggingOff() {},
      'onRequestRespond:'(block) { this.respond = block; },
    }),
    port() { return this.port; },
    isRunning() { return this.running === true; },
    isListening() { return this.running === true; },
    localUrl() { return urlObject(`http://localhost:${this.port}`); },
  });
  function answer({ method, url, headers, body }) {
    const request = globals.ZnRequest._new();
    Object.assign(request, { method, uri: urlObject(url) });
    for (const [name, value] of Object.entries(headers)) request._headers()._at_put_(name, value);
    if (body instanceof Uint8Array) request.body = globals.ZnMultiPartFormDataEntity.read(body, headers['content-type']);
    else if (body !== undefined) request.body = entity(body, headers['content-type']);
    const respond = () => this.respond._value_(request);
    const reply = respond._on_do_(globals.Error, (error) => globals.ZnResponse._serverError_(printed(error)));
    const sent = { server: 'Zinc HTTP Components 1.0 (Amber)' };
    if (reply.body) sent['content-type'] = reply.body['@type'];
    for (const [name, value] of values(reply._headers())) sent[name.toLowerCase()] = value;
    const contents = reply.body ? reply.body['@contents'] : '';
    const bytes = contents instanceof Uint8Array ? contents : String(contents);
    return { status: reply['@code'], headers: sent, body: Buffer.from(bytes) };
  }
  const printed = (error) => error._description();
  on(ZnServer.klass, {
    'on:'(port) {
      const server = this._new();
      server.port = port || nextPort++;
      server.answer = answer;
      servers.set(server.port, server);
      return server;
    },
  });
}

module.exports = { install, serve };
