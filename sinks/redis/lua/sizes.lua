-- How long the logs are.
--
-- KEYS: the logs. Returns the number of bytes of each.

local sizes = {}
for i, log in ipairs(KEYS) do
  sizes[i] = redis.call('STRLEN', log)
end
return sizes
