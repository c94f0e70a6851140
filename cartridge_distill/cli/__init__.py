"""The command line ``cartridge-distill``.

===========  =====================================================================
``main``     the commands, their options and help
``doctor``   what is there, what fits together, and the fix for what does not
``serve``    cartridges behind OpenAI's chat API
===========  =====================================================================
"""
