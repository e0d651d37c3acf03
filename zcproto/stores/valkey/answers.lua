-- Requests with an idempotency key: a second common part, for the scripts of this file. The rules are in answers.py,
-- the keys in sessions.lua.
--
-- q:{TAG} has for each request: its place in the order, whether it is running (1) or answered (0), when it expires,
-- the size of the answer, the digest of the request, the NODE that runs it. The field "" has the next place, bytes and
-- count.
-- In the indexes w and o the place stands before TAG and DIGEST, so that of those that expire at the same time the
-- oldest comes first. Places are counted for all users together, in a cluster for each user.

local RUNNING, LATE = 1, 3600000

-- Return when a request counts as absent. A process may live and be late with the renewal of its claim.
local function kept_until(entry)
  return entry[2] == RUNNING and entry[6] and after(entry[3], LATE) or entry[3]
end

-- Return whether another process has claimed the request.
local function is_foreign(entry)
  return entry[6] and entry[6] ~= NODE
end

local function load(tag)
  local key = P .. 'q:{' .. tag .. '}'
  local raw = redis.call('HGET', key, '')
  local share = raw and cmsgpack.unpack(raw) or {0, 0, 0}
  return {tag = tag, key = key, next = share[1], bytes = share[2], count = share[3], was = raw}
end

local function save(share, ms)
  if share.count == 0 then
    redis.call('DEL', share.key)
  else
    redis.call('HSET', share.key, '', cmsgpack.pack({share.next, share.bytes, share.count}))
    linger(redis.call, share.key, ms)
  end
end

local function entry(share, digest)
  local raw = redis.call('HGET', share.key, digest)
  return raw and cmsgpack.unpack(raw)
end

local function body_key(share, digest)
  return P .. 'a:{' .. share.tag .. '}' .. digest
end

local function index(running)
  return P .. (running == RUNNING and 'w:' or 'o:') .. SHARD
end

local function member(share, digest, place)
  return string.format('%016.0f', place) .. share.tag .. digest
end

local function remove(share, digest, entry)
  redis.call('HDEL', share.key, digest)
  redis.call('DEL', body_key(share, digest))
  share.bytes, share.count = share.bytes - entry[4], share.count - 1
  elsewhere('ZREM', index(entry[2]), member(share, digest, entry[1]))
  if entry[4] > 0 then
    elsewhere('INCRBY', P .. 'b:' .. SHARD, -entry[4])
  end
end

local function add(share, digest, running, until_, size, request, ms)
  local place = CLUSTERED and share.next or redis.call('INCR', P .. 'n')
  redis.call('HSET', share.key, digest, cmsgpack.pack({place, running, until_, size, request, NODE}))
  share.next, share.bytes, share.count = share.next + 1, share.bytes + size, share.count + 1
  elsewhere('ZADD', index(running), until_, member(share, digest, place))
  linger(elsewhere, index(running), ms)
  if size > 0 then
    elsewhere('INCRBY', P .. 'b:' .. SHARD, size)
    linger(elsewhere, P .. 'b:' .. SHARD, ms)
  end
end

local function extend(share, digest, entry, until_, ms)
  entry[3] = until_
  redis.call('HSET', share.key, digest, cmsgpack.pack(entry))
  elsewhere('ZADD', index(RUNNING), until_, member(share, digest, entry[1]))
  linger(elsewhere, index(RUNNING), ms)
end

-- Return the answered requests of a user, oldest first, and remove the expired ones.
local function answered(share, wall)
  local done, all = {}, redis.call('HGETALL', share.key)
  for n = 1, #all, 2 do
    if all[n] ~= '' then
      local entry = cmsgpack.unpack(all[n + 1])
      if not before(wall, kept_until(entry)) then
        remove(share, all[n], entry)
      elseif entry[2] ~= RUNNING then
        done[#done + 1] = {all[n], entry}
      end
    end
  end
  table.sort(done, function(a, b) return a[2][1] < b[2][1] end)
  return done
end

-- Return the result with the totals of all users; in a cluster they are not known here.
local function totals(state, body)
  if CLUSTERED then
    return answer({state, body, 0, 0})
  end
  local count = redis.call('ZCARD', index(RUNNING)) + redis.call('ZCARD', index(0))
  return answer({state, body, count, tonumber(redis.call('GET', P .. 'b:' .. SHARD) or 0)})
end

--@ claim
-- The claim of another process that has expired is given away only if that is `gone`.
local digest, request, given, lease, ms, most, gone = unpack(args, 6, 12)
local share, wall = load(tag), time(given)
local known = entry(share, digest)
if known and not before(wall, known[3]) and before(wall, kept_until(known)) and is_foreign(known) and known[6] ~= gone then
  return answer({'expired', known[6], known[5] == request and 1 or 0, 0})
end
if known and before(wall, known[3]) then
  if known[5] ~= request then
    return answer({'conflict', '', 0, 0})
  elseif known[2] == RUNNING then
    if known[6] == NODE then
      extend(share, digest, known, after(wall, lease), ms)
      save(share, ms)
    end
    return answer({'running', known[6] or '', 0, 0})
  end
  local body = redis.call('GET', body_key(share, digest))
  if body then
    return answer({'done', body, 0, 0})
  end
end
if known then
  remove(share, digest, known)
end
if share.count >= most then
  local done = answered(share, wall)
  if share.count >= most then
    if #done == 0 then
      save(share, ms)
      return answer({'full', '', 0, 0})
    end
    remove(share, done[1][1], done[1][2])
  end
end
add(share, digest, RUNNING, after(wall, lease), 0, request, ms)
save(share, ms)
return totals('new', '')

--@ keep
local digest, body, given, keep, ms, most = unpack(args, 6, 11)
local share, wall = load(tag), time(given)
local known = entry(share, digest)
if not known or is_foreign(known) then
  return answer({'none', '', 0, 0})
end
remove(share, digest, known)
if share.bytes + #body > most then
  for _, old in ipairs(answered(share, wall)) do
    if share.bytes + #body <= most then
      break
    end
    remove(share, old[1], old[2])
  end
end
redis.call('SET', body_key(share, digest), body, 'PX', ms)
add(share, digest, 0, after(wall, keep), #body, known[5], ms)
save(share, ms)
return totals('kept', '')

--@ release allow-oom
local digest, ms = unpack(args, 6, 7)
local share = load(tag)
local known = entry(share, digest)
if known and known[2] == RUNNING and not is_foreign(known) then
  remove(share, digest, known)
  save(share, ms)
end
return answer(0)

--@ expired_answers no-writes
-- Return members of an index: of answered or of running requests.
local given, limit, is_running = unpack(args, 6, 8)
local past = after(time(given), is_running and -LATE or 0)
return answer(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', past, 'LIMIT', 0, limit))

--@ forget_answers allow-oom
-- Remove expired requests; with `also_valid`, answered ones that have not expired too.
local given, limit, members, also_valid, ms = unpack(args, 6, 10)
local wall = time(given)
if not CLUSTERED and not also_valid then
  members = redis.call('ZRANGEBYSCORE', index(RUNNING), '-inf', after(wall, -LATE), 'LIMIT', 0, limit)
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', index(0), '-inf', wall, 'LIMIT', 0, limit - #members)) do
    members[#members + 1] = member
  end
elseif not CLUSTERED then
  members = redis.call('ZRANGE', index(0), 0, limit - 1)
end
local removed = 0
for _, found in ipairs(members) do
  local place, tag, digest = tonumber(found:sub(1, 16)), split(found:sub(17))
  local share = load(tag)
  local known = entry(share, digest)
  if known and known[1] == place and (not before(wall, kept_until(known)) or (also_valid and known[2] ~= RUNNING)) then
    remove(share, digest, known)
    save(share, ms)
    removed = removed + 1
  else  -- a stale index entry
    if not known or known[1] ~= place or known[2] ~= RUNNING then
      elsewhere('ZREM', index(RUNNING), found)
    end
    if not known or known[1] ~= place or known[2] == RUNNING then
      elsewhere('ZREM', index(0), found)
    end
  end
end
return answer({#members, removed})
