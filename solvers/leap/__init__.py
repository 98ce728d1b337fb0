"""D-Wave: the Leap service's hybrid solvers and its quantum processors. Needs the extra ``dwave`` and an account.

    Problem ──RemoteForm──▶ model file ──Connection──▶ the service ──Job──▶ answer ──RemoteForm──▶ choices ──▶ Solution

Nothing is sent unless one of these solvers is selected by name. Before anything is sent, its size is compared with the
limits that the service publishes. A `Job` file with a unique label is written before the upload, so that a broken
connection or a killed process loses no problem and never submits one twice. Tokens are read from the same places as by
D-Wave's client and are passed nowhere else, and they are masked in its log.
"""
