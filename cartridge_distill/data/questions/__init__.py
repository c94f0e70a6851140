"""Questions that a cartridge is judged by: a user's file, or written by the model itself.

    reading   a file of questions: CSV, JSON or JSON lines
    options   wrong answers for questions that come without
    writing   questions that the model writes with the document before it, and how they are checked

None of them is trained on: `prepare` keeps every training prompt away from them
(`decontamination.py`).
"""
