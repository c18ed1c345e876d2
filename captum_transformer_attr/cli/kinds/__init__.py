"""One module per kind of input: from what the user gives to a :class:`~captum_transformer_attr.cli.cases.Case`."""
