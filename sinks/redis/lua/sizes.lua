-- How large the logs of some buckets are.
--
-- KEYS: the logs. Returns the number of bytes of each.

local sizes = {}
for i, key in ipairs(KEYS) do
  sizes[i] = redis.call('STRLEN', key)
end
return sizes
