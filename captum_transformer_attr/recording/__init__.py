"""Recording a forward: the mode, the graph, the tags, the audit."""
