-- Changes the window or a bucket, for the one that keeps the window.
--
-- KEYS: the state, which is the word of who keeps it; the window; the window while it is built; the sorted set to
--       change: that one, the window or a bucket.
-- ARGV: the caller's word; seconds to keep the state; seconds to keep the sorted set; what to do, and its arguments:
--       begin: the caller keeps the window from now on, and builds one; how words begin that give way, '' if all do;
--       ZADD, ZREM: as the command of that name;
--       show: what was built becomes the window;
--       stay: the window lives on; how many contents it must have, the caller's word from now on.
-- Returns 1. It returns 0, and has changed nothing, if another one keeps the window, or if the state or the window is
-- not what the caller left: Redis was emptied or went back in time, or this is a late call that its caller has given up.

local STATE, WINDOW, BUILDING, TARGET = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local WORD, KEEP_STATE, KEEP, ACTION = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

-- Another program's key is an error before anything has changed.
local state, size, built = redis.call('GET', STATE), redis.call('ZCARD', WINDOW), redis.call('ZCARD', BUILDING)
if ACTION == 'begin' then
  if state and #state == #WORD and string.sub(state, 1, #ARGV[5]) ~= ARGV[5] then -- another length: an older release
    return {0}
  end
  redis.call('UNLINK', BUILDING)
elseif state ~= WORD or (ACTION == 'stay' and size ~= tonumber(ARGV[5])) then
  return {0}
elseif ACTION == 'show' then
  redis.call('UNLINK', WINDOW) -- RENAME would free it at once, which takes long
  if built > 0 then
    redis.call('RENAME', BUILDING, WINDOW)
  end
elseif ACTION ~= 'stay' then
  redis.call(ACTION, TARGET, unpack(ARGV, 5))
end
redis.call('EXPIRE', TARGET, KEEP)
redis.call('SETEX', STATE, KEEP_STATE, ACTION == 'stay' and ARGV[6] or WORD)
return {1}
