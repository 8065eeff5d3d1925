"""All that enters a program, and what it runs on: a change here makes packs and kept programs another's."""
