"""The report of one run or several: one HTML file that needs nothing else.

==============  =================================================================
``recipe``      what repeats a run, written beside its metrics when it starts
``reading``     a run's folder -> :class:`~cartridge_distill.report.reading.Run`
``questions``   results question by question, where the evaluation kept them
``groups``      seeds of one recipe together; tokens as a common axis
``comparison``  recipes after equal tokens, a value for each seed
``verdict``     the sentence at the top, and its arithmetic
``colours``     one colour for each run and condition, in table and plots alike
``positions``   divergence along the texts that conditions write themselves
``answers``     what was answered, in words for a few questions and with marks for all
``shading``     the document's text, shaded where the cartridge goes astray
``facts``       how each run was started, and what it took
``figures``     the plots, as plotly figures
``stages``      where the seconds of a step go, as a plot
``page``        the template filled in
==============  =================================================================

``page.html``, ``page.css`` and ``page.js`` are the page itself. Questions, answers and names come
from models and documents: they are escaped, and the page allows no script but its own and no
connection at all (its Content-Security-Policy).
"""
