"""Who calls: tokens, JSON web tokens and client certificates become callers with roles and quotas. No transport."""
