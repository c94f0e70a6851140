"""The command line ``cartridge-distill``.

===========  =====================================================================
``main``     the commands, their options and help
``program``  how every command behaves: errors in one form, exit statuses
``doctor``   what is there, what fits together, and the fix for what does not
``serve``    cartridges behind OpenAI's chat API
===========  =====================================================================
"""
