'use strict';
// Zinc's forms: parts with a name each, written as they travel and read back from that.
const bytesOf = (contents) => (contents instanceof Uint8Array ? Buffer.from(contents) : Buffer.from(String(contents)));

function multipart({ globals, nil, on, subclass, signal }) {
  const { ZnEntity } = globals;
  const ZnMimePart = subclass(globals.Object, 'ZnMimePart');
  function part(disposition, entity) {
    const made = ZnMimePart._new();
    Object.assign(made, { disposition, entity });
    return made;
  }
  on(ZnMimePart.klass, {
    'fieldName:value:': (name, value) => part(`form-data;name="${name}"`, ZnEntity._with_(value)),
    // A file's name travels as UTF-8, byte by byte.
    'fieldName:fileName:entity:': (name, file, entity) =>
      part(`form-data;name="${name}";filename="${Buffer.from(String(file)).toString('latin1')}"`, entity),
  });
  const named = (made, name) => new RegExp(`[; ]${name}="([^"]*)"`).exec(made.disposition);
  on(ZnMimePart, {
    fieldName() { return named(this, 'name')[1]; },
    fileName() {
      const found = named(this, 'filename');
      return found ? Buffer.from(found[1], 'latin1').toString() : nil;
    },
    contents() { return this.entity._contents(); },
    fieldValueString() { return String(this.entity._contents()); },
  });

  // The type holds the boundary, so it is made first.
  const ZnMultiPartFormDataEntity = subclass(ZnEntity, 'ZnMultiPartFormDataEntity');
  function written(form) {
    const pieces = form.parts.flatMap(({ disposition, entity }) => {
      const contents = bytesOf(entity['@contents']);
      const head = [`--${form.boundary}`, `Content-Type: ${entity['@type']}`, `Content-Disposition: ${disposition}`];
      head.push(`Content-Length: ${contents.length}`);
      return [Buffer.from(`${head.join('\r\n')}\r\n\r\n`, 'latin1'), contents, Buffer.from('\r\n')];
    });
    return Uint8Array.from(Buffer.concat([...pieces, Buffer.from(`--${form.boundary}--\r\n`)]));
  }
  function form(boundary, parts) {
    const made = ZnMultiPartFormDataEntity._basicNew();
    Object.assign(made, { boundary, parts });
    made['@type'] = `multipart/form-data;boundary=${boundary}`;
    made['@contents'] = written(made);
    return made;
  }
  on(ZnMultiPartFormDataEntity.klass, { new: () => form(`Boundary-Zn-${Math.random().toString(36).slice(2)}`, []) });
  on(ZnMultiPartFormDataEntity, {
    'addPart:'(one) {
      this.parts.push(one);
      this['@contents'] = written(this);
      return one;
    },
    parts() { return this.parts; },
    'partNamed:'(name) {
      const found = this.parts.find((one) => one._fieldName() === String(name));
      return found || signal(globals.Error, `Cannot find part named ${name}`);
    },
  });

  // What came, from the bytes and the type that came with them.
  function read(bytes, type) {
    const boundary = /boundary=("?)([^";]+)\1/.exec(type)[2];
    const text = Buffer.from(bytes).toString('latin1');
    const pieces = text.split(`--${boundary}`).slice(1, -1);
    return form(boundary, pieces.map(readPart));
  }
  function readPart(piece) {
    const at = piece.indexOf('\r\n\r\n');
    const header = (name) => new RegExp(`^${name}: (.*)$`, 'im').exec(piece.slice(0, at))?.[1].trim();
    const contents = Buffer.from(piece.slice(at + 4, -2), 'latin1');
    const isText = (header('Content-Type') || 'text/plain').startsWith('text/');
    const entity = isText ? ZnEntity._with_(contents.toString()) : ZnEntity._bytes_(Uint8Array.from(contents));
    return part(header('Content-Disposition'), entity);
  }
  globals.ZnMultiPartFormDataEntity.read = read;
}

module.exports = { multipart };
