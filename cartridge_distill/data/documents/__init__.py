"""Documents: from files of any common kind to texts that the teacher can read.

=================  ====================================================================
``reading``        which files, and which reader for each kind (txt, md, html, pdf)
``decoding``       bytes to text: the encoding, and what is not text at all
``likely``         which encoding gives the likeliest text
``markdown``       a Markdown file less what is not text
``page``           an HTML page as Markdown: its visible text, less navigation
``page_tags``      the end tags that a page leaves out
``page_code``      what is code on a page, and what is prose set like code
``page_marks``     powers, indices, fractions and formulas of a page, written out
``pdf``            a PDF by the reader that makes words of it
``pdf_powers``     raised numbers of a PDF, told from the digits before them
``pdf_lines``      what the fonts of a PDF's lines say: headings and code
``page_lines``     pages to one text: running heads, page numbers, divided words
``numbered``       numbered headings of a text without marks
``manual_page``    a manual page as a terminal shows it
``restructured``   reStructuredText less what is not text
``quality``        whether a text reads like words
``blocks``         headings, code and prose, by the rules of the kind of text
``sentence_ends``  where a sentence ends
``structure``      where a text may be cut, and what its pieces are
``usable``         what share of a document can become prompts
``fitting``        how much of a text fits a budget of tokens
``chunking``       a text in pieces of so many tokens, cut at the strongest structure
``source``         a document with its sections, its questions and the parts the teacher reads
``one``            the one document of a command that takes one
=================  ====================================================================
"""
