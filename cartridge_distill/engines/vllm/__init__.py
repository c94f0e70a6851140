"""Cartridges on an unmodified vLLM, one for each request.

vLLM can be given keys and values from elsewhere: that is what its KV connectors are for. Here the
elsewhere is a cartridge. A request is P placeholders and its prompt; vLLM is told that the P tokens
are computed already, the connector writes the cartridge's keys and values into the blocks that
vLLM took for them, and vLLM computes the prompt at positions P, P + 1, ... Nothing of vLLM is
changed or copied; its command line loads two classes of this package::

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "CartridgeConnector", ...}' \\
        --middleware cartridge_distill.engines.vllm.front.CartridgeFront ...

    python -m cartridge_distill.engines.vllm --help    # makes these lines, and the environment

==============  ================================================================================
``versions``    which vLLM this was written for; any other is refused, naming it
``seams``       what of vLLM is relied on, read from its source files
``options``     the settings, which travel in ``--kv-transfer-config``
``catalogue``   cartridges by id: found, read safely, checked, told apart by their content
``wanted``      what a request says of its cartridges, and when it must not be computed
``placing``     which tokens go to which slots of the cache; which heads and layers a rank has
``planning``    the scheduler half: which requests have cartridges, what a step must load
``resident``    cartridges on the device, within a bound
``connector``   the class that vLLM loads; the only module that imports vLLM when it is imported
``answers``     one request through vLLM's engine, behind this project's routes
``front``       puts those routes into vLLM's own HTTP server
``offline``     the same without HTTP, over vLLM's ``LLM``
``launch``      command lines
``environment`` an environment with the tested vLLM
==============  ================================================================================

What is promised, and by what:

* **No placeholder is computed.** The front makes every request with placeholders itself and takes
  none from clients; the connector looks at each one again, and fails it where the two disagree.
* **An answer is of the version that was asked for.** Blocks of vLLM's prefix cache are salted with
  the ids *and the content*, so neither another version nor a file that was replaced can share them.
* **An unknown vLLM does not serve.** The connector API is marked experimental; see ``versions``.
"""
