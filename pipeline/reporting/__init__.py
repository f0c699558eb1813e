"""What several steps report with: tables, figures, HTML pages, statistics."""
