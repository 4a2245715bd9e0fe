"""Pages for the browser: contact sheets and the page of a dataset."""
