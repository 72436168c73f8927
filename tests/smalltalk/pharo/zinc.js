'use strict';
// Zinc: its client, entities, Base64 and the exceptions of the network.
const { multipart } = require('./multipart.js');
const { serve } = require('./zinc_server.js');

module.exports = function zinc({ globals, nil, on, subclass, signal }) {
  const NetworkError = subclass(globals.Error, 'NetworkError');
  const ConnectionTimedOut = subclass(NetworkError, 'ConnectionTimedOut');
  const ConnectionClosed = subclass(NetworkError, 'ConnectionClosed');
  const NameLookupFailure = subclass(NetworkError, 'NameLookupFailure');
  const ZnEntityTooLarge = subclass(globals.Error, 'ZnEntityTooLarge');
  const ZnCharacterEncodingError = subclass(globals.Error, 'ZnCharacterEncodingError');

  const ZnUnknownHttpVersion = subclass(subclass(globals.Error, 'ZnParseError'), 'ZnUnknownHttpVersion');

  on(ZnUnknownHttpVersion.klass, { 'version:'() { return this._new(); } });
  subclass(ZnCharacterEncodingError, 'ZnInvalidUTF8');
  subclass(ZnCharacterEncodingError, 'ZnIncomplete');

  // Strict about white space too, as when whitespace: nil is set.
  on(subclass(globals.Object, 'ZnBase64Encoder'), {
    'whitespace:'() { return this; },
    'encode:': (bytes) => Buffer.from(bytes).toString('base64'),
    'decode:'(string) {
      if (!/^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$/.test(string)) {
        signal(ZnCharacterEncodingError, 'Illegal Base64 input');
      }
      return Uint8Array.from(Buffer.from(string, 'base64'));
    },
  });

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
  on(ZnEntity.klass, {
    'bytes:'(bytes) {
      const entity = this._new();
      entity['@type'] = 'application/octet-stream';
      entity['@contents'] = bytes;
      return entity;
    },
  });
  multipart({ globals, nil, on, subclass, signal });
  on(subclass(globals.Object, 'ZnResponse', ['code']), { code() { return this['@code']; } });

  // Of a reply that is streamed: bytes, each waited for, nil at the end.
  const ZnStreamingEntity = subclass(globals.Object, 'ZnStreamingEntity', ['stream']);
  on(ZnStreamingEntity, {
    stream() { return this['@stream']; },
    contents() {
      const bytes = [];
      for (let byte; (byte = this['@stream']._next()) !== nil; ) bytes.push(byte);
      return Uint8Array.from(bytes);
    },
  });
  on(subclass(globals.Object, 'ZnChunkedReadStream'), {
    next() {
      while (this.index >= this.piece.length) {
        const piece = this.reply.read();
        if (piece === null) return nil;
        if (piece.failure) fail(piece, this.url);
        [this.piece, this.index] = [piece, 0];
      }
      return this.piece[this.index++];
    },
    isBinary: () => true,
  });
  function streamingEntity(reply, url) {
    const stream = globals.ZnChunkedReadStream._new();
    Object.assign(stream, { reply, url, piece: [], index: 0 });
    const entity = ZnStreamingEntity._new();
    entity['@stream'] = stream;
    return entity;
  }
  const FAILURES = {
    ECONNREFUSED: [ConnectionTimedOut, ({ hostname, port }) => `Cannot connect to ${hostname}:${port || 80}`],
    ETIMEDOUT: [ConnectionTimedOut, () => 'Data receive timed out.'],
    ENOTFOUND: [NameLookupFailure, ({ hostname }) => hostname],
    EAI_AGAIN: [NameLookupFailure, ({ hostname }) => hostname],
    ECONNRESET: [ConnectionClosed, () => 'Connection closed while waiting for data.'],
  };
  // What came is no status line: nothing at all, or another protocol's.
  const isNoReply = ({ failure }) => failure === 'ENOREPLY' || failure.startsWith('HPE_');
  function fail(reply, url) {
    if (isNoReply(reply)) signal(ZnUnknownHttpVersion, '');
    const [klass, text] = FAILURES[reply.failure] || [NetworkError, () => reply.message];
    signal(klass, text(url));
  }
  function execute(client, method) {
    const url = new URL(client.url);
    url.pathname += (url.pathname.endsWith('/') ? '' : '/') + client.segments.map(encodeURIComponent).join('/');
    client.query.forEach(([key, value]) => url.searchParams.set(key, value));
    const headers = { 'user-agent': 'Zinc HTTP Components 1.0 (Amber)', accept: '*/*', ...client.headers };
    const entity = method === 'POST' ? client.sent : undefined;
    if (entity) headers['content-type'] = entity['@type'];
    const body = entity && entity['@contents'];
    const request = { method, url: url.href, headers, body, timeout: client.seconds || 30 };
    const reply = serve(request, client.isStreaming);
    if (reply.failure) fail(reply, url);
    client.reply = reply;
    if (client.isStreaming) {
      client.received = streamingEntity(reply, url);
    } else if (reply.body.length > (client.limit || 16 * 1024 * 1024)) {
      signal(ZnEntityTooLarge, 'Entity too large');
    } else {
      client.text = Uint8Array.from(reply.body)._utf8Decoded();
    }
    return client._contents();
  }
  const settings = {
    'url:'(string) { this.url = string; this.segments = []; this.query = []; },
    'addPath:'(segments) { segments._do_((each) => this.segments.push(String(each))); },
    'queryAt:put:'(key, value) { this.query.push([String(key), String(value)]); },
    'accept:'(type) { this.headers = { ...this.headers, accept: type }; },
    'timeout:'(seconds) { this.seconds = seconds; },
    'maximumEntitySize:'(bytes) { this.limit = bytes; },
    'setBearerAuthentication:'(key) { this.headers = { ...this.headers, authorization: `Bearer ${key}` }; },
    'entity:'(entity) { this.sent = entity; },
    'streaming:'(boolean) {
      if (boolean && this.oneShot) signal(globals.Error, 'I cannot do streaming when #isOneShot is true.');
      this.isStreaming = boolean;
    },
    beOneShot() {
      if (this.isStreaming) signal(globals.Error, 'I cannot be one shot when #streaming is true.');
      this.oneShot = true;
      this.headers = { ...this.headers, connection: 'close' };
    },
    close() { if (this.reply && this.reply.close) this.reply.close(); },
  };
  const answerSelf = (fn) => function (...args) { fn.apply(this, args); return this; };
  const ZnClient = subclass(globals.Object, 'ZnClient');
  on(ZnClient, Object.fromEntries(Object.entries(settings).map(([selector, fn]) => [selector, answerSelf(fn)])));
  on(ZnClient, {
    get() { return execute(this, 'GET'); },
    post() { return execute(this, 'POST'); },
    delete() { return execute(this, 'DELETE'); },
    isSuccess() { return this.reply.status >= 200 && this.reply.status < 300; },
    contents() {
      if (this.isStreaming) return this.received._stream();
      return this.text || nil;
    },
    response() {
      const response = globals.ZnResponse._new();
      response['@code'] = this.reply.status;
      for (const [name, value] of Object.entries(this.reply.headers)) response._headers()._at_put_(name, value);
      if (this.isStreaming) response.body = this.received;
      return response;
    },
  });
};
