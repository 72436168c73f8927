'use strict';
// HTTP that this thread waits for: a worker thread does the talking and posts what comes, as it comes.
const { MessageChannel, Worker, isMainThread, parentPort, receiveMessageOnPort, workerData } = require('worker_threads');

if (isMainThread) {
  const arrived = new Int32Array(new SharedArrayBuffer(4));
  const { port1, port2 } = new MessageChannel();
  const worker = new Worker(__filename, { workerData: { arrived, port: port2 }, transferList: [port2] });
  worker.unref();

  const waiting = new Map(); // exchange -> messages that came while another one was waited for
  let last = 0;

  function next(id) {
    for (;;) {
      const seen = Atomics.load(arrived, 0);
      for (let received; (received = receiveMessageOnPort(port1)); ) {
        waiting.get(received.message.id)?.push(received.message);
      }
      if (waiting.get(id).length) return waiting.get(id).shift();
      Atomics.wait(arrived, 0, seen);
    }
  }

  // {method, url, headers, body, timeout in s} -> {status, headers, read, close}, or {failure, message}.
  // read answers the next piece as it comes, null at the end, or {failure, message}. As to Zinc, a connection that
  // is closed is the end, be there more to come or not.
  function open(request) {
    const id = (last += 1);
    waiting.set(id, []);
    worker.postMessage({ id, ...request });
    const close = () => {
      if (waiting.delete(id)) worker.postMessage({ id, close: true });
    };
    const head = next(id);
    if (head.failure) {
      close();
      return head;
    }
    let end;
    const read = () => {
      if (end === undefined) {
        const message = next(id);
        if (message.piece) return message.piece;
        end = message.failure ? message : null;
      }
      return end;
    };
    return { status: head.status, headers: head.headers, read, close };
  }

  // The same with all of the body: {status, headers, body}.
  function exchange(request) {
    const reply = open(request);
    if (reply.failure) return reply;
    const pieces = [];
    let piece = reply.read();
    for (; piece && !piece.failure; piece = reply.read()) pieces.push(piece);
    reply.close();
    return piece || { status: reply.status, headers: reply.headers, body: Buffer.concat(pieces) };
  }
  module.exports = { exchange, open };
} else {
  const http = require('http');
  const requests = new Map();
  const tell = (message) => {
    workerData.port.postMessage(message);
    Atomics.add(workerData.arrived, 0, 1);
    Atomics.notify(workerData.arrived, 0);
  };
  // Node gives these one code; a socket that was reset names the system call that failed.
  const codeOf = (error) => (error.code === 'ECONNRESET' && !error.syscall ? 'ENOREPLY' : error.code);
  const begin = ({ id, method, url, headers, body, timeout }) => {
    const fail = (error) => tell({ id, failure: codeOf(error) || 'ERROR', message: error.message });
    const request = http.request(url, { method, headers, timeout: timeout * 1000, agent: false }, (response) => {
      tell({ id, status: response.statusCode, headers: response.headers });
      response.on('data', (piece) => tell({ id, piece }));
      response.on('end', () => tell({ id }));
      response.on('aborted', () => tell({ id })); // closed before the end; after a reset 'error' has told it
      response.on('error', () => {});
    });
    request.on('timeout', () => {
      fail({ code: 'ETIMEDOUT', message: 'no data' });
      request.destroy();
    });
    request.on('error', fail);
    request.end(body === undefined ? undefined : Buffer.from(body, 'utf8'));
    requests.set(id, request);
  };
  const start = (message) => {
    try {
      begin(message);
    } catch (error) {
      tell({ id: message.id, failure: error.code || 'ERROR', message: error.message }); // a wait would never end
    }
  };
  parentPort.on('message', (message) => {
    if (!message.close) return start(message);
    requests.get(message.id)?.destroy();
    requests.delete(message.id);
  });
}
