"""``python -m captum_transformer_attr`` is the command line."""

from captum_transformer_attr.cli import main

raise SystemExit(main())
