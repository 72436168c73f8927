"""Jobs: what the worker is doing, what waits, what ended a while ago; and how to cancel it."""

from flask import Blueprint, Response

from ..errors import json_reply
from ..transport import worker

blueprint = Blueprint("jobs", __name__, url_prefix="/v1/jobs")


@blueprint.get("")
def list_jobs() -> Response:
    return json_reply({"object": "list", "data": worker().jobs()})


@blueprint.get("/<job_id>")
def get_job(job_id: str) -> Response:
    return json_reply(worker().shown(worker().job(job_id)))


@blueprint.delete("/<job_id>")
def cancel_job(job_id: str) -> Response:
    """Cancels at the next step; one that has ended stays as it is."""
    return json_reply(worker().cancel(job_id))
