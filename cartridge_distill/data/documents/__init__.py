"""Documents: from files of any common kind to texts that the teacher can read.

reading     which files, and the text out of each kind (txt, md, html, pdf)
decoding    bytes to text: the encoding, and what is not text at all
structure   headings, paragraphs, list items and sentences of a text
chunking    a text in pieces of so many tokens, cut at the strongest structure
source      a document with its sections, its questions and the parts the teacher reads
"""
