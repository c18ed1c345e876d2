"""Recording a forward as one autograd graph, and sending signals back through it.

Where to start: ``session`` (one recording from beginning to end), ``recorder`` (what happens to each torch function),
``node`` (a recorded operation), ``signal`` (what travels back), ``audit`` (nothing was missed). What is known of a
tensor: ``tags`` and ``layout``. Nothing here knows the operations (``ops`` enters them in ``registry``), the rules or
the methods.
"""
