"""What a process that Ray starts needs in its environment, for MindSpore to be loaded into it."""

ENVIRONMENT = {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
"""MindSpore's generated protobuf code is older than what Ray loads before it; this implementation takes both. A YAML
with `ray_actor_options` replaces those of the code, so ray_serve.yaml says it for the application as well."""
