'use strict';
// One HTTP exchange, waited for: a worker thread does the talking, this thread sleeps until it is done.
const { MessageChannel, Worker, isMainThread, parentPort, receiveMessageOnPort, workerData } = require('worker_threads');

if (isMainThread) {
  const signal = new Int32Array(new SharedArrayBuffer(4));
  const { port1, port2 } = new MessageChannel();
  const worker = new Worker(__filename, { workerData: { signal, port: port2 }, transferList: [port2] });
  worker.unref();

  // {method, url, headers, body, timeout in s} -> {status, headers, body} or {failure, message}.
  module.exports = function exchange(request) {
    Atomics.store(signal, 0, 0);
    worker.postMessage(request);
    Atomics.wait(signal, 0, 0);
    return receiveMessageOnPort(port1).message;
  };
} else {
  const http = require('http');
  const answer = (message) => {
    workerData.port.postMessage(message);
    Atomics.store(workerData.signal, 0, 1);
    Atomics.notify(workerData.signal, 0);
  };
  parentPort.on('message', ({ method, url, headers, body, timeout }) => {
    let done = false;
    const finish = (message) => {
      if (!done) answer(message);
      done = true;
    };
    const fail = (error) => finish({ failure: error.code || 'ERROR', message: error.message });
    const request = http.request(url, { method, headers, timeout: timeout * 1000, agent: false }, (response) => {
      const parts = [];
      response.on('data', (part) => parts.push(part));
      response.on('end', () =>
        finish({ status: response.statusCode, headers: response.headers, body: Buffer.concat(parts) }),
      );
      response.on('aborted', () => fail({ code: 'ECONNRESET', message: 'the connection was closed' }));
    });
    request.on('timeout', () => {
      fail({ code: 'ETIMEDOUT', message: 'no data' });
      request.destroy();
    });
    request.on('error', fail);
    request.end(body === undefined ? undefined : Buffer.from(body, 'utf8'));
  });
}
