"""The gateway: a Tokasaurus-protocol server that the world may see, and cartridges that arrive.

It starts the server (the real one, or the embedded one) as its child on the loopback, waits until
it answers, and passes completions through. It takes new cartridge versions over HTTP, checks them,
and puts them where the server reads them. Start it with ``python -m cartridge_distill.gateway``
(``--help`` teaches), or mount :func:`cartridge_distill.gateway.app.create_app`, as Modal does.

================  ==================================================================
``settings``      what can be set; the token, from the environment
``app``           the routes, and what happens at start and stop
``guard``         before any route: the bearer token
``completions``   completion requests: limits, cartridges that are there, the way through
``chat``          OpenAI's chat API in front of the same completions
``uploads``       ``PUT /cartridges/{id}``: taken in, bound to its id, made to work
``receiving``     an upload's bytes: checked on their way to the disk
``store``         the versions on disk: immutable, counted, kept within a bound
``version_info``  what stands beside a version's files, and why one is refused
``refusals``      versions that lie on the disk and are not served, each with its reason
``verifying``     are the files of a version those that were uploaded?
``refusals``      versions that lie on the disk and are not served, each with its reason
``lock``          one gateway a directory
``process``       the server process: started, watched, drained, started again
``commands``      what that process is
``pages``         the pages that versions have taken of its cache; a restart before they run out
``model_shape``   what a cartridge of the served model must look like
``metrics``       Prometheus
================  ==================================================================

It needs no model library but transformers' configuration reader, and of the embedded server's code
it imports the chat API's requests and answers alone: it runs in the real server's environment.
"""
