'use strict';
// What Amber lacks of Pharo, as far as the package uses it, with Pharo's answers:
// Zinc's client, STON's JSON, float arrays, a few selectors. Everything that differs between the two stands here.
//
// Not imitated, because Amber cannot tell: a Symbol is a String here, a whole Float is an Integer, there are no
// Fractions (Pharo's STON reads 1e-5 as one) and an Array can grow.
const PARTS = [
  require('./kernel.js'),
  require('./collections.js'),
  require('./blocks.js'),
  require('./ston.js'),
  require('./zinc.js'),
  require('./zinc_server.js').install,
  require('./files.js'),
  require('./sunit.js'),
];

module.exports = function installPharo(amber) {
  const tools = { ...amber, ...require('./define.js')(amber) };
  PARTS.forEach((install) => install(tools));
};
