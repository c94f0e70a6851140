"""The command line ``cartridge-distill``.

================  ================================================================
``main``          the commands, their options and help
``program``       how every command behaves: errors in one form, exit statuses, other processes
``options``       what several commands have
``files``         other formats, joining, the Hub
``doctor``        what is there, what fits together, and the fix for what does not
``untrained``     ``init``: a cartridge before its first step
``serve``         the rollout server for training, or cartridges behind OpenAI's chat API
``serve_vllm``    the same with vLLM, or the line that starts it
``chat``          the options of a conversation in the terminal
``conversation``  the conversation itself
``opened``        a model behind cartridge and document, ready to be asked
``terminal``      how it looks: what is typed, answers as they come, side by side
``about``         what is known of a cartridge: its model, its document, questions about it
``shown``         what a server of cartridges shows: models by name, documents, the page's figures
``describe``      what ``info`` shows of a cartridge
================  ================================================================
"""
