"""Jobs: what the worker is doing, what waits, what ended a while ago; and how to cancel it."""

from flask import Blueprint, Response

from ..description import described
from ..errors import json_reply
from ..schemas.queries import NoQuery
from ..schemas.replies import JobReply, JobsReply
from ..transport import read_query, worker

blueprint = Blueprint("jobs", __name__, url_prefix="/v1/jobs")


@blueprint.get("")
@described(replies=JobsReply, tags=["Jobs"])
def list_jobs() -> Response:
    """Every request that the worker works on or that waits for it, and those that ended a while ago."""
    read_query(NoQuery)
    return json_reply({"object": "list", "data": worker().jobs()})


@blueprint.get("/<job_id>")
@described(replies=JobReply, tags=["Jobs"], errors=(404,))
def get_job(job_id: str) -> Response:
    """How far a job has come, and its result if it ran in the background."""
    read_query(NoQuery)
    return json_reply(worker().shown(worker().job(job_id)))


@blueprint.delete("/<job_id>")
@described(replies=JobReply, tags=["Jobs"], errors=(404,))
def cancel_job(job_id: str) -> Response:
    """Cancel a job at its next step; one that has ended stays as it is."""
    read_query(NoQuery)
    return json_reply(worker().cancel(job_id))
