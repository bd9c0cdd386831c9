"""Problems in their seeded order, and how they become prompts."""
