"""What the site is made with: pages from the code, docstrings and formulas typeset, figures from committed records."""
