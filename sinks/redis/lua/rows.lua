-- Applies the changes of some rows, if all that they were computed from is still so.
--
-- KEYS: those that the plan names, by their numbers from 1. The first is the hash of the rows.
-- ARGV: the plan as MessagePack: `ids` and `states`, what the hash has of each row, '' for nothing; `newest`, pairs of a
--       key and its value, '' for none; `counts`, `lasts` and `buckets`, the keys that change; `commands`, each a name, a
--       key and arguments; the first ones set the rows' states, in their order.
-- Returns 1, or 0 if anything has changed meanwhile: then nothing is done, and the caller computes it again.
--
-- All reads come first, so that another program's key is an error before anything has changed.

local plan = cmsgpack.unpack(ARGV[1])
local SLICE = 1500 -- Lua passes at most some 8,000 arguments to a command

for from = 1, #plan.ids, SLICE do
  local to = math.min(from + SLICE - 1, #plan.ids)
  for i, state in ipairs(redis.call('HMGET', KEYS[1], unpack(plan.ids, from, to))) do
    if (state or '') ~= plan.states[from + i - 1] then
      return {0}
    end
  end
end
for _, pair in ipairs(plan.newest) do
  if (redis.call('GET', KEYS[pair[1]]) or '') ~= pair[2] then
    return {0}
  end
end
for _, key in ipairs(plan.counts) do
  if not tonumber(redis.call('GET', KEYS[key]) or '0') then
    return redis.error_reply('WRONGTYPE a count is not a number')
  end
end
for _, key in ipairs(plan.lasts) do
  redis.call('STRLEN', KEYS[key])
end
for _, key in ipairs(plan.buckets) do
  redis.call('ZCARD', KEYS[key])
end

-- A right may be missing from one command on: what was done before is undone, so that the batch counts whole or not at
-- all. What is newest need not be: it is set again.
local function undo(done)
  for i = 1, done do
    local name, key, by = plan.commands[i][1], KEYS[plan.commands[i][2]], plan.commands[i][3]
    if name == 'HSET' then
      redis.call(name, key, by, plan.states[i])
    elseif name == 'INCRBY' or name == 'ZINCRBY' then
      redis.call(name, key, -by, unpack(plan.commands[i], 4))
    end
  end
end

for i, command in ipairs(plan.commands) do
  local answer = redis.pcall(command[1], KEYS[command[2]], unpack(command, 3))
  if type(answer) == 'table' and answer.err then
    undo(i - 1)
    return answer
  end
end
return {1}
