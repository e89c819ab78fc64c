//! The catalogue of problems: every code that a response can carry, with status, title, cause and fix.
//!
//! Owns: the closed list, and that the library's answers (marked `Answer`) are all in it under the library's
//! codes. Must not know: requests, which error of the library has which answer. Codes are part of the API and
//! only ever added.

use axum::http::StatusCode;
use mirrorvm::codes::Answer;
use serde::Serialize;
use utoipa::ToSchema;

macro_rules! catalogue {
    ($($(#[doc = $doc:literal])+ $name:ident = $($answer:ident)? $code:literal, $status:ident, retry $retry:literal,
        $title:literal, cause $cause:literal, fix $fix:literal;)+) => {
        /// Stable code of a problem. The list is closed within one version of the document.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, ToSchema)]
        pub enum ProblemCode {
            $($(#[doc = $doc])+ #[serde(rename = $code)] $name,)+
        }

        impl ProblemCode {
            /// Every code, in the order of the catalogue.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The code as the API spells it.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $code,)+ }
            }

            /// The HTTP status that goes with it.
            pub const fn status(self) -> StatusCode {
                match self { $(Self::$name => StatusCode::$status,)+ }
            }

            /// Short name of the problem, for people.
            pub const fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)+ }
            }

            /// Whether the same request may work later.
            pub const fn retryable(self) -> bool {
                match self { $(Self::$name => $retry,)+ }
            }

            /// What leads to it.
            pub const fn cause(self) -> &'static str {
                match self { $(Self::$name => $cause,)+ }
            }

            /// What to do about it.
            pub const fn fix(self) -> &'static str {
                match self { $(Self::$name => $fix,)+ }
            }
        }

        impl From<Answer> for ProblemCode {
            /// An answer of the library's that is not in the catalogue does not compile.
            fn from(answer: Answer) -> Self {
                match answer { $($($answer::$name => Self::$name,)?)+ }
            }
        }

        $($(const _: () = assert!(
            is_same($code, $answer::$name.code().as_str()),
            concat!("the library has another code than ", $code)
        );)?)+
    };
}

/// Whether two codes are one, for the compiler.
const fn is_same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

catalogue! {
    /// The body is not JSON.
    MalformedJson = "malformed_json", BAD_REQUEST, retry false,
        "The body is not JSON",
        cause "The request body is empty, is not valid JSON or UTF-8, names a key twice or is nested too deeply.",
        fix "Send one JSON object. `detail` says at which line and column reading stopped.";
    /// The request itself cannot be parsed.
    MalformedRequest = "malformed_request", BAD_REQUEST, retry false,
        "The request cannot be parsed",
        cause "This is not an HTTP/1.1 request, or it has no Host header or more than one; the path, the query or a header is not valid UTF-8 or has a broken percent escape; or the body broke off.",
        fix "Send HTTP/1.1 with one Host header; percent-encode paths and query values; send header values as visible ASCII.";
    /// A browser page of another origin, or a name that is not this machine's loopback.
    OriginRefused = "origin_refused", FORBIDDEN, retry false,
        "The Host or Origin is not this machine's",
        cause "Over loopback TCP, the Host header names something other than a loopback address; or, there and over TLS, Origin or Sec-Fetch-Site says that a page of another origin has sent the request. That is what DNS rebinding and cross-site requests look like. With a session, an upgrade must send Origin.",
        fix "Address the daemon as `localhost`, `127.0.0.1` or `[::1]`, or use its Unix socket; in a browser, call it only from the daemon's own pages.";
    /// A change by session that a page of another origin may have sent.
    SessionHeaderRequired = "session_header_required", FORBIDDEN, retry false,
        "A change by session needs the header X-Mirrorvm",
        cause "The caller is known by a session's cookie, or wants to open a session, and the request lacks `X-Mirrorvm: 1`. Browsers send cookies with every request that any page makes; a page of another origin cannot add this header.",
        fix "Send `X-Mirrorvm: 1` with every method except GET and HEAD, or use a bearer token, which does not need it.";
    /// A link that opens no session.
    LinkRefused = "link_refused", FORBIDDEN, retry false,
        "The link opens no session",
        cause "Each link opens one session, within 60 seconds, and only while the daemon that made it runs. This code was used already, is too old, was withdrawn, or never existed.",
        fix "Get another link with `mirrorvmd open`. If you have not used this one, somebody else may have: look at the sessions in `/v1/tokens` and withdraw those that are not yours.";
    /// There is nothing that a browser could open.
    NoNetworkListener = "no_network_listener", CONFLICT, retry false,
        "The daemon serves no address that a browser can open",
        cause "The daemon listens only on Unix sockets.",
        fix "Start it with `--listen tcp:127.0.0.1:8080` (or `tls:`) and try again.";
    /// The caller is not known.
    Unauthenticated = "unauthenticated", UNAUTHORIZED, retry false,
        "The caller is not known",
        cause "The request carries no credential that this daemon accepts: its bearer token or session is missing, unknown, expired or withdrawn, and no client certificate or local user maps to a role. A TCP connection does not say who calls, not even on loopback.",
        fix "Send `Authorization: Bearer <token>` with a token from `POST /v1/tokens` or from `admin.token` in the daemon's state directory, connect over the Unix socket as a user or with a certificate that the daemon's configuration maps to a role, or, in a browser, open a session with `mirrorvmd open`. No credential is read from a query. `/v1/whoami` says who you are.";
    /// The caller may not do this.
    Forbidden = "forbidden", FORBIDDEN, retry false,
        "The caller may not do this",
        cause "The caller's role does not include the operation, or gives access only to resources of its own.",
        fix "Use credentials with the role that the operation's description names.";
    /// There is no such resource.
    NotFound = Answer "not_found", NOT_FOUND, retry false,
        "No such resource",
        cause "No resource has this id or name on this host, or it has no such part (page digests of a migration without `verify`).",
        fix "List the collection to see what there is.";
    /// There is no such route.
    RouteNotFound = "route_not_found", NOT_FOUND, retry false,
        "No such route",
        cause "The path is not part of this API.",
        fix "See `/v1/openapi.json` or `/docs` for the paths there are.";
    /// The route does not take the method.
    MethodNotAllowed = "method_not_allowed", METHOD_NOT_ALLOWED, retry false,
        "The route does not take this method",
        cause "The path exists, but not with this method.",
        fix "Use one of the methods in the `Allow` header.";
    /// The resource has no representation that the caller accepts.
    NotAcceptable = "not_acceptable", NOT_ACCEPTABLE, retry false,
        "No acceptable representation",
        cause "The `Accept` header rules out every media type that the resource has.",
        fix "Accept one of the media types that the document lists for the operation.";
    /// The request arrived too slowly.
    RequestTimeout = "request_timeout", REQUEST_TIMEOUT, retry true,
        "The request arrived too slowly",
        cause "The head was not complete within 10 seconds (`limits.header_seconds` of the daemon's configuration), or the body within 30 (`limits.body_seconds`).",
        fix "Send it again over a better connection.";
    /// The name is taken.
    NameTaken = Answer "name_taken", CONFLICT, retry false,
        "The name is taken",
        cause "Another guest or host of this daemon has the name.",
        fix "Choose another name, or remove the other resource.";
    /// The action does not fit the state.
    StateConflict = Answer "state_conflict", CONFLICT, retry false,
        "The action does not fit the resource's state",
        cause "`current_state` is not one of `allowed_states`.",
        fix "Bring the resource into one of `allowed_states` first; a long poll with `wait` tells when it is there.";
    /// A migration has the guest.
    GuestMigrating = Answer "guest_migrating", CONFLICT, retry true,
        "A migration has the guest",
        cause "Until the migration has ended, only it may change the guest.",
        fix "Wait for the migration to end, or cancel it.";
    /// The guest runs on another host now.
    GuestMoved = Answer "guest_moved", CONFLICT, retry false,
        "The guest was handed over to another host",
        cause "A migration succeeded; starting the guest here again would give two copies.",
        fix "Use the host named in the guest's `moved_to`, or delete the guest here.";
    /// The guest may be on another host.
    GuestUnconfirmed = Answer "guest_unconfirmed", CONFLICT, retry true,
        "Nobody has confirmed yet that the guest is this host's",
        cause "The host's state was put back from a backup, or the host went on with what was left of it, so the guest may have moved in the meantime. Known peers are being asked.",
        fix "Wait until all known peers have answered; or, where nobody else can have the guest, confirm it with `POST /v1/guests/{guest}/confirm`.";
    /// Something uses the resource.
    InUse = Answer "in_use", CONFLICT, retry true,
        "The resource is in use",
        cause "Another resource depends on it.",
        fix "Remove what uses it first. Where a mirror uses the guest, a migration can go through it: name it by `\"mirror\": {\"kind\": \"existing\", \"mirror\": ID}`.";
    /// The id is taken by something else.
    IdTaken = Answer "id_taken", CONFLICT, retry false,
        "Another resource has this id",
        cause "A `PUT` names an id that exists, with a definition that differs from the one that the resource was made from.",
        fix "Choose another id. To change the resource use `PATCH`; to make sure that it exists send the definition that it was made from.";
    /// The host is in maintenance.
    HostInMaintenance = Answer "host_in_maintenance", CONFLICT, retry true,
        "The host is in maintenance",
        cause "`maintenance` is set on `/v1/host`: guests may leave, but none can be defined or started, and no migration is let in.",
        fix "Use another host, or unset `maintenance` with `PATCH /v1/host`.";
    /// The first request with this key has not ended.
    IdempotencyKeyInUse = "idempotency_key_in_use", CONFLICT, retry true,
        "The first request with this key is still running",
        cause "Another request with the same `Idempotency-Key` has not been answered yet.",
        fix "Send it again after `Retry-After` seconds: the answer will be the first request's.";
    /// No guest could start in such RAM.
    LayoutUnusable = Answer "layout_unusable", CONFLICT, retry false,
        "The guest cannot start in its RAM",
        cause "The guest's driver cannot start a guest in RAM that is laid out like this: the first block is too small for what it loads there, or no block is plugged. Such definitions are refused; this one is of an earlier build, or all its blocks are unplugged.",
        fix "Define the guest anew with a larger first block; `detail` says how many bytes are needed. Where no block is plugged, add one that is.";
    /// It is too late to call the migration off.
    PastPointOfNoReturn = Answer "past_point_of_no_return", CONFLICT, retry false,
        "The migration cannot be canceled any more",
        cause "The destination may already run the guest; calling it off here could leave two copies, or none.",
        fix "Wait for the migration to end. `in_doubt` is settled by the destination's token, never by a guess.";
    /// The events after a cursor are not kept any more.
    EventCursorExpired = "event_cursor_expired", GONE, retry false,
        "The events after this cursor are not kept any more",
        cause "The cursor is older than the oldest event that is kept, or comes from another daemon's history.",
        fix "Read the resources again, then continue from `latest` (or from `oldest`, to see what is still kept).";
    /// The resource is not what `If-Match` expects.
    PreconditionFailed = Answer "precondition_failed", PRECONDITION_FAILED, retry false,
        "The resource has changed",
        cause "`If-Match` does not name the current ETag (the resource's `generation` in quotes).",
        fix "Read the resource again, then decide whether the change is still wanted.";
    /// The change must be conditional.
    PreconditionRequired = "precondition_required", PRECONDITION_REQUIRED, retry false,
        "This daemon takes only conditional changes",
        cause "`require_if_match` is set in the daemon's configuration, and the request has no `If-Match`.",
        fix "Read the resource and send its ETag in `If-Match`, or `If-Match: *` if any version will do.";
    /// The body is too large.
    PayloadTooLarge = "payload_too_large", PAYLOAD_TOO_LARGE, retry false,
        "The body is too large",
        cause "A request body may have at most 65536 bytes; for an address-space plan 1 MiB, for a step of an import 2 MiB, and for the content of a helper image 16 MiB.",
        fix "Send a shorter body.";
    /// The body is not of a known media type.
    UnsupportedMediaType = "unsupported_media_type", UNSUPPORTED_MEDIA_TYPE, retry false,
        "The body's media type is not supported",
        cause "`Content-Type` is missing, or is not what the route takes; or the body has a content encoding, or a transfer coding other than `chunked`.",
        fix "Send what the `Accept-Post` or `Accept-Patch` header of the answer says: `application/json`, for `PATCH` `application/merge-patch+json`, for contents `application/octet-stream`.";
    /// The values cannot be used.
    ValidationFailed = Answer "validation_failed", UNPROCESSABLE_ENTITY, retry false,
        "Some values cannot be used",
        cause "The request is well formed, but fields or parameters are missing, unknown, of the wrong type or out of range. `errors` names each of them.",
        fix "Correct what `errors` points at.";
    /// The key was used for another request before.
    IdempotencyKeyReused = "idempotency_key_reused", UNPROCESSABLE_ENTITY, retry false,
        "The idempotency key belongs to another request",
        cause "The same principal has used this `Idempotency-Key` within 24 hours for a request with another method, path or body.",
        fix "Use a new key for a new request; repeat the first request byte for byte to get its answer again.";
    /// The bytes are no helper image.
    HelperImageInvalid = "helper_image_invalid", UNPROCESSABLE_ENTITY, retry false,
        "The bytes are not a helper image",
        cause "The header of the content fails a check. `errors` says which.",
        fix "Upload an image built for a helper ABI that this host runs; `/v1/host/capabilities` has the range.";
    /// A helper image's file is damaged.
    HelperImageFailed = Answer "helper_image_failed", CONFLICT, retry false,
        "The helper image cannot be used",
        cause "The image's file in the state directory is missing, or is not what was uploaded. `detail` says which.",
        fix "PUT the same content again, or delete the image and upload another; `mirrorvmd state restore` brings files back, too.";
    /// The head is too large.
    HeadersTooLarge = "headers_too_large", REQUEST_HEADER_FIELDS_TOO_LARGE, retry false,
        "The request's head is too large",
        cause "First line and headers have more than 65536 bytes together, or there are more than 64 headers.",
        fix "Send fewer and shorter headers; put large content into the body.";
    /// The target is too long.
    UriTooLong = "uri_too_long", URI_TOO_LONG, retry false,
        "The request's target is too long",
        cause "Path and query do not fit into the 65536 bytes of a request's head.",
        fix "Send a shorter path and query; ask for fewer things at once.";
    /// Every connection is used.
    TooManyConnections = "too_many_connections", SERVICE_UNAVAILABLE, retry true,
        "All connections are in use",
        cause "Every connection that the listener may have (`limits.connections` of the daemon's configuration), or every one that a single address may have, is busy with a request. `/livez`, `/readyz` and `/metrics` are still answered.",
        fix "Wait for `Retry-After` seconds; use fewer connections, or another listener.";
    /// Too many callers are waiting already.
    TooManyLongPolls = "too_many_long_polls", SERVICE_UNAVAILABLE, retry true,
        "Too many callers wait",
        cause "As many long polls are waiting as are allowed (`limits.long_polls` of the daemon's configuration, at most half of `limits.connections`), or this principal has half of them.",
        fix "Wait for `Retry-After` seconds, ask without `wait`, or follow `/v1/events/stream` instead of many resources.";
    /// The principal sends too many requests.
    TooManyRequests = "too_many_requests", TOO_MANY_REQUESTS, retry true,
        "Too many requests",
        cause "The principal has sent more requests than `limits.requests_per_second` of the daemon's configuration allows, or has 8 links to sessions that it has not used yet.",
        fix "Wait for `Retry-After` seconds. Where `detail` is about links, wait for a minute or use one of them.";
    /// The planner refuses the address space.
    PlanRefused = Answer "plan_refused", UNPROCESSABLE_ENTITY, retry false,
        "The address space cannot be laid out",
        cause "The strategy does not work for this guest's RAM layout on this host. `errors` has every refusal with code, value and index.",
        fix "Choose another strategy or shift; preview with `/v1/guests/{guest}/address-space-plans`.";
    /// A bug or a broken host.
    Internal = Answer "internal", INTERNAL_SERVER_ERROR, retry false,
        "The daemon failed",
        cause "A fault of the daemon or its host. The reason is in the daemon's log under `request_id`.",
        fix "Look into the log; report it with the request id if it is a bug.";
    /// The guest's policy forbids it.
    PolicyForbids = Answer "policy_forbids", CONFLICT, retry false,
        "The guest's policy forbids it",
        cause "The guest's SEV policy has NOSEND (it must not leave its platform), or lacks NODBG (a host could read it through its mirror).",
        fix "Define the guest with a policy that has NODBG and not NOSEND. A policy is fixed for the guest's life.";
    /// The mirror of an SEV-ES guest comes with its launch.
    MirrorAtLaunch = Answer "mirror_at_launch", CONFLICT, retry false,
        "The mirror comes with the guest's launch",
        cause "The vCPUs of an SEV-ES guest's mirror are measured before the guest's launch ends. No other mirror can be made afterwards, nor this one removed.",
        fix "Name the mirror that is wanted in `driver.sev.mirror` and start the guest anew, or use the one that it has.";
    /// The helper was not loaded for this plan.
    HelperNotLaunched = Answer "helper_not_launched", CONFLICT, retry false,
        "The helper was not launched for this plan",
        cause "No host can write an encrypted guest's helper after its launch; the page tables and the allow-list that this plan needs were not loaded then (an explicit shift, or RAM that was plugged or unplugged since under identity-cbit).",
        fix "Use a strategy as `GET /v1/strategies` lists it, with RAM plugged as at the guest's start.";
    /// The guest is not ready to be migrated.
    GuestNotReady = Answer "guest_not_ready", CONFLICT, retry true,
        "The guest is not ready to be migrated",
        cause "The guest has not written 1 to MSR_KVM_MIGRATION_CONTROL, or has cleared it since, as Linux does when a CPU goes offline or it is suspended.",
        fix "Look at `migration_readiness` of the guest; make it announce itself again, or restart it.";
    /// A RAM block cannot be plugged or unplugged.
    PlugRefused = Answer "plug_refused", CONFLICT, retry true,
        "The RAM block cannot be plugged or unplugged",
        cause "The block is plugged elsewhere, the guest runs from it or has not let go of it, or the address overlaps another block.",
        fix "`detail` says which. Resume a paused guest so that it can let go; choose a free address.";
    /// This host cannot do it.
    CapabilityMissing = Answer "capability_missing", NOT_IMPLEMENTED, retry false,
        "This host cannot do it",
        cause "The hardware, the kernel or a program that the request needs is missing.",
        fix "`missing` in `/v1/host/capabilities` says what would help.";
    /// The other host would not let the migration in.
    DestinationRefuses = Answer "destination_refuses", CONFLICT, retry true,
        "The destination would not let the migration in",
        cause "The other host was asked and would refuse this migration: for instance because the guest's name or id is taken there, files or memory are missing, or it is in maintenance. `blocked_reasons` has every reason, with the code that the migration would fail with.",
        fix "`POST /v1/migration-checks` says for each reason what would help.";
    /// The other host did not do its part.
    PeerFailed = Answer "peer_failed", BAD_GATEWAY, retry true,
        "The other host did not answer as it should",
        cause "The destination cannot be reached, has another identity than the pinned one, or refuses. `detail` says what.",
        fix "Check the address and identity in `/v1/hosts`, and that the other daemon knows this host and has a peer listener.";
    /// The other host did not answer.
    PeerTimedOut = Answer "peer_timed_out", GATEWAY_TIMEOUT, retry true,
        "The other host did not answer in time",
        cause "A connection existed or was being made, and nothing came over it in time.",
        fix "Check the network between the hosts; try again.";
    /// Somebody else is at the other host's address.
    PeerNotMirrorvm = Answer "peer_not_mirrorvm", BAD_GATEWAY, retry false,
        "No mirrorvm daemon is at the other host's address",
        cause "What answers there speaks another protocol, such as HTTP or SSH; `detail` quotes the beginning of what it said.",
        fix "Correct the address, and above all its port: it must be the one on which the other daemon listens for peers (`peer_address` of its `/v1/host`), not that of its API.";
    /// The other host's name leads nowhere.
    PeerUnresolved = Answer "peer_unresolved", BAD_GATEWAY, retry true,
        "The other host's name cannot be resolved",
        cause "The resolver of this host has no usable address for the name in `address`, or does not answer; `detail` says which.",
        fix "Check the name and this host's resolver, or register the other host with its IP address.";
    /// A sealed batch was not taken.
    BatchRefused = Answer "batch_refused", UNPROCESSABLE_ENTITY, retry false,
        "The helper does not take the sealed batch",
        cause "A record does not open (`unsealed`: it was changed, sealed for another import, repeated or out of order), it is for a page that the helper may not write (`page_refused`) or has written already (`page_repeated`), or the batch is not complete (`incomplete`). The import is over; `errors[0].index` is the record, and the pages before it were written.",
        fix "Open a new import and export the pages again for it. Give batches in the order in which they were sealed, each once.";
    /// There is not enough memory.
    NoMemory = Answer "no_memory", SERVICE_UNAVAILABLE, retry true,
        "There is not enough memory",
        cause "The request needs more memory than is available from the host, from a control group of the daemon, or in reserved huge pages, after what running guests were promised and have not touched yet. Nothing was changed. `errors[0].what` says what limits it, `value` how many bytes are needed and `bound` how many are available.",
        fix "Stop or migrate a guest, raise the limit, or define the guest smaller or with another `memory.backing`; then try again.";
    /// The host has run out of something.
    NoResources = Answer "no_resources", SERVICE_UNAVAILABLE, retry true,
        "The host has run out of something",
        cause "File descriptors, streams or another limited resource are used up.",
        fix "Free some, or try again later.";
    /// No space is left for the database.
    StorageFull = Answer "storage_full", INSUFFICIENT_STORAGE, retry true,
        "No space is left for the daemon's database",
        cause "The file system of the state directory is full, so what was asked for cannot be stored. Nothing was changed, unless `detail` says that the change was made and its record is kept in memory until it can be written.",
        fix "Free space in the file system of the state directory, then send the request again. The daemon need not be restarted; `/readyz?verbose=true` says when it writes again.";
    /// Another process keeps the database locked.
    StorageBusy = Answer "storage_busy", SERVICE_UNAVAILABLE, retry true,
        "Another process keeps the daemon's database locked",
        cause "A program beside the daemon holds a lock on its database, for instance a copy or an inspection that is under way. The daemon waits for two seconds at most. Nothing was changed, unless `detail` says that the change was made and its record is kept in memory until it can be written.",
        fix "Send the request again in a moment; end the other program if it does not end by itself. `/readyz?verbose=true` says when the daemon writes again.";
    /// The database cannot be written.
    StorageFailed = Answer "storage_failed", SERVICE_UNAVAILABLE, retry true,
        "The daemon's database cannot be written",
        cause "The disk fails or does not answer, or what is on it is damaged. Nothing was changed, unless `detail` says that the change was made and its record is kept in memory until it can be written.",
        fix "Look at the disk of the state directory, then send the request again. `/readyz?verbose=true` says when the daemon writes again.";
    /// The daemon is not ready yet.
    NotReady = "not_ready", SERVICE_UNAVAILABLE, retry true,
        "The daemon is starting",
        cause "The state directory is still being opened and reconciled.",
        fix "Try again when `/readyz` answers 200.";
    /// The daemon shuts down.
    ShuttingDown = Answer "shutting_down", SERVICE_UNAVAILABLE, retry true,
        "The daemon shuts down",
        cause "The daemon has been told to end.",
        fix "Try again when it runs again.";
    /// The daemon did not answer in time.
    TimedOut = "timed_out", SERVICE_UNAVAILABLE, retry true,
        "The daemon did not answer in time",
        cause "The operation took longer than a request may. It is not undone: it may still finish.",
        fix "Read the resource to see what became of it before trying again.";
}

impl ProblemCode {
    /// The code spelled `code`.
    pub fn parse(code: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|c| c.as_str() == code)
    }
}
