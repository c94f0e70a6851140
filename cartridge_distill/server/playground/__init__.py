"""A page to look at what a cartridge is worth: one question, three answers side by side.

One file, made of ``page.html``, ``page.css`` and ``page.js`` in this folder. It loads nothing but
itself, and asks the server that it came from, through OpenAI's chat API.
"""
