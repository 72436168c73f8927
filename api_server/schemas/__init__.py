"""What requests and replies hold, as pydantic models that know no transport."""
