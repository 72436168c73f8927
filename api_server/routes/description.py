"""``/openapi.json`` and ``/docs``, a page that shows it and tries it out. The page asks no other host for anything."""

from importlib.resources import files

from flask import Blueprint, Response, current_app, request

from ..description import describe_api
from ..errors import ApiError, json_reply
from ..schemas.queries import NoQuery
from ..transport import config, read_query

blueprint = Blueprint("description", __name__)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>NeuroScope for MLX: REST API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger_style.css">
</head>
<body>
<div id="docs"></div>
<script src="/docs/swagger_bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
# Without validatorUrl null, Swagger UI asks a server of its makers to check the description.
_START = """SwaggerUIBundle({
  url: '/openapi.json', dom_id: '#docs', validatorUrl: null, deepLinking: true, defaultModelsExpandDepth: 0
});
"""
_ASSETS = {"swagger_bundle.js": "text/javascript", "swagger_style.css": "text/css"}
# Swagger UI styles elements one by one, and its stylesheet holds its pictures.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


@blueprint.get("/openapi.json")
def openapi() -> Response:
    read_query(NoQuery)
    return json_reply(describe_api(current_app, config()))


@blueprint.get("/docs")
def docs() -> Response:
    return Response(_PAGE, content_type="text/html; charset=utf-8", headers={"Content-Security-Policy": _POLICY})


@blueprint.get("/docs/<name>")
def asset(name: str) -> Response:
    if name == "start.js":
        return Response(_START, content_type="text/javascript; charset=utf-8")
    if name not in _ASSETS:
        raise ApiError(404, "There is no such address. GET /docs is the page.", code="not_found")
    response = Response((files("offapi") / name).read_bytes(), content_type=f"{_ASSETS[name]}; charset=utf-8")
    response.cache_control.max_age = 3600
    response.add_etag()
    response.make_conditional(request)
    return response
